"""Find the first layer and op of a graph that do not do what their references do.

Every custom op of the inlined graph is computed again by its torch reference from what it read in the graph's
own run: activations and states as recorded, weights from the checkpoint, RoPE frequencies from the
configuration. So an error upstream does not count against it, and a wrong constant, attribute-free body or
kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from v4graph.config import ModelConfig
from v4graph.ops import OpSpec
from v4graph.ops.tolerance import mismatch
from v4graph.passes.facts import KIND, LAYER, custom_nodes
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.run import apply
from v4graph.verify.graph_runner import GraphRunner, bound_weights
from v4graph.verify.random_inputs import Array
from v4graph.verify.schedules import Call, chunk_of
from v4graph.verify.sides import Side


@dataclass(frozen=True)
class Culprit:
    """An op whose output leaves its tolerance, in call number `call` of a schedule.

    `inputs` are what the reference was given, `read` what the graph's op read where that differs, `got` and
    `want` the outputs by port.
    """

    layer: str
    kind: str
    node: str
    spec: OpSpec
    attributes: dict[str, Any]
    port: str
    problem: str
    call: int
    inputs: dict[str, Array]
    read: dict[str, Array]
    got: dict[str, Array]
    want: dict[str, Array]
    model: ir.Model

    @property
    def sentence(self) -> str:
        """Where it is and what is wrong."""
        constants = [name for name in self.read if name == "freqs"]
        why = f" It reads other {', '.join(constants)} than config.json gives." if constants else ""
        weights = [name for name in self.read if name != "freqs"]
        why += f" It reads other weights than the checkpoint's: {', '.join(weights)}." if weights else ""
        place = f"{self.layer} ({self.kind})" if self.kind != self.layer else self.layer
        return f"first wrong op: {self.node} in {place}, output '{self.port}': {self.problem}.{why}"


def find_culprit(side: Side, ids: Array, calls: Sequence[Call]) -> Culprit | None:
    """Return the first op that leaves its tolerance, or None if all agree with their references."""
    assert side.manifest is not None
    model = ir.load(side.folder / "model.onnx")
    manifest = side.manifest
    weights = bound_weights(manifest, side.weights, str(side.folder))
    initializers = {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value
    }
    apply(InlineLayers(), model)
    nodes = list(custom_nodes(model))
    original = ir.from_proto(ir.to_proto(model))
    # What custom ops read and write; between them a graph may hold types that numpy lacks.
    seen = {value: None for node, _ in nodes for value in (*node.inputs, *node.outputs) if value is not None}
    for value in seen:
        if value.producer() is not None and not value.is_graph_output():
            model.graph.outputs.append(value)
    runner = GraphRunner(model, manifest, weights, ids.shape[0], side.folder)
    config = ModelConfig.from_dict(manifest.config, source=str(side.folder))
    for number, call in enumerate(calls):
        chunk = chunk_of(ids, runner.position, call.counts)
        before = {**initializers, **runner.feeds(chunk, call.counts)}
        values = {**before, **runner.step(chunk, call.counts)}
        for node, spec in nodes:
            found = _replay(node, spec, values, config, call.counts)
            if found is not None:
                return _culprit(node, spec, found, number, original)
        if any(call.back):
            runner.position -= call.back
    return None


@dataclass(frozen=True)
class _Found:
    port: str
    problem: str
    inputs: dict[str, Array]
    read: dict[str, Array]
    got: dict[str, Array]
    want: dict[str, Array]


def _replay(
    node: ir.Node, spec: OpSpec, values: dict[str, Array], config: ModelConfig, counts: Sequence[int]
) -> _Found | None:
    read = {
        port.name: values[str(value.name)]
        for port, value in zip(spec.inputs, node.inputs, strict=True)
        if value is not None
    }
    given = dict(read)
    if "freqs" in given:
        given["freqs"] = _frequencies(node, config)
    attributes = {name: node.attributes[name].value for name in spec.attributes}
    want = reference(spec, given, attributes)
    got = {port.name: values[str(value.name)] for port, value in zip(spec.outputs, node.outputs, strict=True)}
    for port in spec.outputs:
        mine, theirs = _valid(spec, port.name, got, want, counts)
        problem = mismatch(spec, mine, theirs, attributes)
        if problem:
            differing = {
                k: v
                for k, v in read.items()
                if not np.array_equal(v, given[k], equal_nan=v.dtype.kind == "f")
            }
            text = problem.removeprefix(f"{spec.name}: ")
            return _Found(port.name, text, given, differing, got, want)
    return None


def _valid(
    spec: OpSpec, port: str, got: dict[str, Array], want: dict[str, Array], counts: Sequence[int]
) -> tuple[Array, Array]:
    """Leave out tokens past a slot's last valid one, whose values nobody reads."""
    dims = next(one.dims for one in spec.outputs if one.name == port)
    mine, theirs = got[port], want[port]
    if dims[:2] != ("B", "S") or mine.shape != theirs.shape or mine.shape[0] != len(counts):
        return mine, theirs
    keep = np.arange(mine.shape[1]) < np.array(counts)[:, None]
    return mine[keep], theirs[keep]


def reference(spec: OpSpec, inputs: dict[str, Array], attributes: dict[str, Any]) -> dict[str, Array]:
    """Return what the op's torch reference makes of numpy inputs, by port."""
    import torch

    def tensor(array: Array) -> torch.Tensor:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))

    tensors = [tensor(inputs[port.name]) for port in spec.inputs]
    with torch.no_grad():
        results = spec.reference(*tensors, *(attributes[name] for name in spec.attributes))
    results = results if isinstance(results, tuple) else (results,)
    return {port.name: result.numpy() for port, result in zip(spec.outputs, results, strict=True)}


def _frequencies(node: ir.Node, config: ModelConfig) -> Array:
    number = node.metadata_props[LAYER].removeprefix("layers.")
    rope = config.compress_rope if config.layers[int(number)].ratio else config.rope
    return rope.frequencies()


def _culprit(node: ir.Node, spec: OpSpec, found: _Found, number: int, model: ir.Model) -> Culprit:
    return Culprit(
        layer=node.metadata_props[LAYER],
        kind=node.metadata_props[KIND],
        node=str(node.name),
        spec=spec,
        attributes={name: node.attributes[name].value for name in spec.attributes},
        port=found.port,
        problem=found.problem,
        call=number,
        inputs=found.inputs,
        read=found.read,
        got=found.got,
        want=found.want,
        model=model,
    )
