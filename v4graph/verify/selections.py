"""Force what a top-k selects, so that two graphs are compared past a tie that a rounding broke.

Before: what attends reads `rows = V4IndexTopK(q, weights, keys, freqs, start)`. After: it reads a graph
input, and the rows are an output of the graph, to be compared by themselves.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4graph.ops import OpSpec
from v4graph.passes.facts import custom_nodes
from v4graph.verify.random_inputs import Array, Sizes

TOPK = ("V4IndexTopK", "V4RouteTopK")


def force_selections(model: ir.Model, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Change an inlined model in place; return the arrays of its new inputs."""
    forced: dict[str, Array] = {}
    generator = np.random.default_rng(seed)
    for node, spec in list(custom_nodes(model)):
        if spec.name not in TOPK:
            continue
        chosen = (
            _rows(node, sizes, generator) if spec.name == "V4IndexTopK" else _experts(node, sizes, generator)
        )
        _replace(model, node, spec, chosen, forced)
    return forced


def _replace(
    model: ir.Model, node: ir.Node, spec: OpSpec, chosen: list[Array], forced: dict[str, Array]
) -> None:
    for port, value, array in zip(spec.outputs, node.outputs, chosen, strict=True):
        given = ir.Value(
            name=f"forced.{value.name}",
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        assert port.dtypes == (array.dtype.name,)
        model.graph.inputs.append(given)
        ir.convenience.replace_all_uses_with(value, given)
        forced[str(given.name)] = array


def _rows(node: ir.Node, sizes: Sizes, generator: np.random.Generator) -> list[Array]:
    """Entries that each token can see, -1 where there are no more."""
    topk, ratio = node.attributes["topk"].as_int(), node.attributes["ratio"].as_int()
    rows = np.full((len(sizes.start), sizes.tokens, topk), -1, np.int32)
    for slot, start in enumerate(sizes.start):
        for token in range(sizes.tokens):
            visible = min((start + token + 1) // ratio, sizes.capacity // ratio)
            some = generator.permutation(visible)[:topk]
            rows[slot, token, : len(some)] = some
    return [rows]


def _experts(node: ir.Node, sizes: Sizes, generator: np.random.Generator) -> list[Array]:
    """Different experts, and weights that add up to the scale."""
    topk, scale = node.attributes["topk"].as_int(), node.attributes["scale"].as_float()
    gate = node.inputs[1]
    assert gate is not None and gate.shape is not None
    experts = int(gate.shape[0])  # type: ignore[arg-type]
    shape = (len(sizes.start), sizes.tokens)
    ids = np.stack([generator.permutation(experts)[:topk] for _ in range(shape[0] * shape[1])])
    weights = generator.random((*shape, topk), np.float32) + 0.1
    return [
        ids.reshape(*shape, topk).astype(np.int32),
        weights / weights.sum(-1, keepdims=True) * np.float32(scale),
    ]
