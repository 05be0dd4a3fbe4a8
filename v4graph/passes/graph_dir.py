"""A graph directory as a model, and a changed model as a graph directory again.

The manifest follows the graph: states and weights that are no inputs any more leave it, and it names the ops
and layer functions that are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import onnx
import onnx_ir as ir

from v4graph.errors import PassError
from v4graph.manifest import FILE_NAME, Binding, Manifest, State
from v4graph.new_folder import new_folder
from v4graph.ops import DOMAIN, OPS_BY_NAME
from v4graph.passes.facts import LAYER_PREFIX, plain_name

MODEL_FILE = "model.onnx"
_Patterned = TypeVar("_Patterned", Binding, State)


def load_graph(folder: Path) -> tuple[ir.Model, Manifest]:
    """Read a graph directory.

    Raises:
        ManifestError: not a graph directory.
        PassError: its model.onnx cannot be read.
    """
    manifest = Manifest.load(folder, kind="graph")
    try:
        return ir.load(folder / MODEL_FILE), manifest
    except Exception as error:  # protobuf and onnx_ir raise errors without a common base
        raise PassError(
            f"{folder / MODEL_FILE}: not an ONNX model ({error}); export it again with `v4graph export`."
        ) from error


def op_versions(model: ir.Model) -> dict[str, int]:
    """Return the custom ops that the graph or its functions use, with their versions."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    used = {
        plain_name(node.op_type)
        for graph in graphs
        for node in ir.traversal.RecursiveGraphIterator(graph)
        if node.domain == DOMAIN
    }
    return {name: OPS_BY_NAME[name].version for name in sorted(used & OPS_BY_NAME.keys())}


def follow(manifest: Manifest, model: ir.Model, passes: Sequence[str]) -> Manifest:
    """Return the manifest of a changed model, after `passes` more."""
    inputs = {value.name for value in model.graph.inputs} | set(model.graph.initializers)
    functions: dict[str, list[int]] = {}
    for node in model.graph:
        if node.op_type.startswith(LAYER_PREFIX) and node.name:
            functions.setdefault(node.op_type, []).append(int(node.name.removeprefix("layers.")))
    inlined = not functions
    return dataclasses.replace(
        manifest,
        states=_present(manifest.states, "name", inputs),
        bindings=_present(manifest.bindings, "input", inputs),
        ops=op_versions(model),
        layer_functions=manifest.layer_functions
        if inlined
        else {name: tuple(layers) for name, layers in functions.items()},
        passes=(*manifest.passes, *passes),
    )


def _present(entries: tuple[_Patterned, ...], field: str, inputs: set[str | None]) -> tuple[_Patterned, ...]:
    """Keep of each pattern the layers whose input is there."""
    kept = []
    for entry in entries:
        name = getattr(entry, field)
        layers = tuple(i for i in entry.layers if name.replace("{i}", str(i)) in inputs)
        if layers or (not entry.layers and name in inputs):
            kept.append(dataclasses.replace(entry, layers=layers))
    return tuple(kept)


def save_graph(model: ir.Model, manifest: Manifest, source: Path, out: Path) -> None:
    """Write a graph directory; other files of `source` (tokenizer, embedded weights) go along.

    Raises:
        PassError: `out` exists and is not empty, or the model is not valid ONNX.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PassError(f"{out}: exists and is not empty; remove it or choose another directory.")
    with new_folder(out) as partial:
        for path in sorted(source.iterdir()):
            if path.name not in (MODEL_FILE, FILE_NAME) and path.is_file():
                # A copy: onnx refuses external data with several hard links.
                shutil.copyfile(path, partial / path.name)
        proto = ir.to_proto(model)
        (partial / MODEL_FILE).write_bytes(proto.SerializeToString(deterministic=True))
        try:
            onnx.checker.check_model(str(partial / MODEL_FILE))
        except onnx.checker.ValidationError as error:
            raise PassError(f"the passes left an invalid graph: {error}") from error
        digests = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(partial.iterdir())
            if path.suffix != ".safetensors"
        }
        dataclasses.replace(manifest, files=digests).save(partial)
