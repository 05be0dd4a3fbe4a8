"""Graph directory to what TensorRT parses: the passes, and the checks that precede the parser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from v4graph.errors import EngineError, near_match
from v4graph.manifest import Manifest
from v4graph.ops import OPS_BY_NAME
from v4graph.passes import check_tensorrt, pipeline
from v4graph.passes.facts import custom_nodes, plain_name, where
from v4graph_plugins.catalogue import plugin_versions


@dataclass(frozen=True)
class Lowered:
    """The lowered graph: serialized ONNX, uses of each plugin, ops left to their bodies, and places.

    `places` maps node names to the layer kind that they belong to, for error texts.
    """

    onnx: bytes
    plugins: dict[str, int]
    bodies: tuple[str, ...]
    places: dict[str, str]
    passes: tuple[str, ...]


def lower(path: Path, manifest: Manifest, targets: Sequence[str], without: Collection[str]) -> Lowered:
    """Lower model.onnx; the ops in `without` keep their bodies.

    Raises:
        EngineError: an unknown op, another op version, a wrong dtype, or tensors that a target cannot hold.
    """
    versions = plugin_versions()
    for name in without:
        if name not in versions:
            raise EngineError(f"--no-plugin {name}: no such plugin{near_match(name, versions)}.")
    plugins = {name: version for name, version in versions.items() if name not in without}
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise errors without a common base
        raise EngineError(
            f"{path}: not an ONNX model ({error}); export it again with `v4graph export`."
        ) from error
    done = []
    for one in pipeline.tensorrt(plugins):
        one(model)
        done.append(repr(one))
    check_tensorrt.check_unknown(model)
    check_tensorrt.check_versions(model, manifest.ops, plugins)
    check_tensorrt.check_dtypes(model)
    check_tensorrt.check_states(model, manifest)
    check_tensorrt.check_targets(model, targets)
    used = Counter(spec.name for _, spec in custom_nodes(model))
    bodies = {plain_name(function.name) for function in model.functions.values()} & OPS_BY_NAME.keys()
    return Lowered(
        onnx=ir.to_proto(model).SerializeToString(deterministic=True),
        plugins={name: used[name] for name in sorted(used) if name in plugins},
        bodies=tuple(sorted(bodies)),
        places={node.name: where(node) for node in model.graph if node.name},
        passes=tuple(done),
    )
