"""Leave the last V4HyperPost of a layer to the next layer, where it meets a V4HyperPre.

Before: a layer takes the streams and ends with `V4HyperPost(y, x, post, comb)`. After: it takes y, x, post
and comb, begins with that V4HyperPost and returns its own four; the head begins with one too. The embedding
returns y = the embedding, post = 1 and comb = 0, of which V4HyperPost makes four equal streams again.
Condition: every layer function ends so and the embedding and the head are where the exporter puts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from v4graph.ops import DOMAIN
from v4graph.passes.facts import LAYER_PREFIX, plain_name

EMBED, HEAD = "V4Embed", "V4Head"
_PENDING = ("y", "x", "post", "comb")


class DeferHyperPost(ir.passes.InPlacePass):
    """Moves the last V4HyperPost of every layer into the next one, so that it can be fused there."""

    def __repr__(self) -> str:
        return "DeferHyperPost"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change `model` in place."""
        functions = {
            function.name: function for function in model.functions.values() if function.domain == DOMAIN
        }
        layers = [f for name, f in functions.items() if name.startswith(LAYER_PREFIX)]
        ends = {EMBED, HEAD} <= functions.keys()
        posts = [node for layer in layers if (node := _last_post(layer)) is not None]
        if not (layers and ends and len(posts) == len(layers) and _is_chain(model)):
            return ir.passes.PassResult(model, modified=False)
        post = posts[0].op_type
        for layer, last in zip(layers, posts, strict=True):
            _give_pending(layer, last)
            _take_pending(layer, post)
        _start_pending(functions[EMBED])
        _take_pending(functions[HEAD], post)
        _rewire(model)
        return ir.passes.PassResult(model, modified=True)


def _last_post(function: ir.Function) -> ir.Node | None:
    """Return the V4HyperPost that makes a layer's streams, if nothing else in the layer reads them."""
    streams = function.outputs[0]
    node = streams.producer()
    if node is None or node.domain != DOMAIN or plain_name(node.op_type) != "V4HyperPost" or streams.uses():
        return None
    return node


def _is_chain(model: ir.Model) -> bool:
    """Whether the streams go from call to call: the first output of each is the first input of the next."""
    nodes = [node for node in model.graph if node.op_type.startswith((EMBED, LAYER_PREFIX, HEAD))]
    links = itertools.pairwise(nodes)
    return (
        len(nodes) > 1
        and (nodes[0].op_type, nodes[-1].op_type) == (EMBED, HEAD)
        and all(
            after.inputs[0] is before.outputs[0] and len(before.outputs[0].uses()) == 1
            for before, after in links
        )
    )


def _give_pending(function: ir.Function, node: ir.Node) -> None:
    """Return what the last V4HyperPost reads instead of what it makes."""
    function.outputs[:1] = [value for value in node.inputs if value is not None]
    function.remove(node, safe=True)


def _take_pending(function: ir.Function, op_type: str) -> None:
    """Take y, x, post and comb for the streams, and make the streams of them first."""
    streams = function.inputs[0]
    pending = [ir.Value(name=f"before.{name}") for name in _PENDING]
    node = ir.Node(DOMAIN, op_type, pending, num_outputs=1)
    node.outputs[0].name = "streams_before"
    function.insert_before(function[0], node)
    ir.convenience.replace_all_uses_with(streams, node.outputs[0])
    function.inputs[:1] = pending


def _start_pending(function: ir.Function) -> None:
    """Return y, x, post and comb that stand for the embedding's streams."""
    streams, tokens = function.outputs[0], function.inputs[0]
    nodes: list[ir.Node] = []

    def add(
        op: str, inputs: list[ir.Value], name: str, attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        node = ir.node(op, inputs, dict(attributes or {}))
        node.outputs[0].name = name
        nodes.append(node)
        return node.outputs[0]

    def constant(value: np.ndarray, name: str) -> ir.Value:
        return add("Constant", [], name, {"value": ir.tensor(value)})

    y = add("Gather", [streams, constant(np.array(0), "first")], "y", {"axis": 2})
    shape = add("Shape", [tokens], "shape")
    results = [y, streams]
    for name, value, size in (("post", 1.0, [4]), ("comb", 0.0, [4, 4])):
        full = add("Concat", [shape, constant(np.array(size), f"{name}_size")], f"{name}_shape", {"axis": 0})
        results.append(add("Expand", [constant(np.array(value, np.float32), f"{name}_value"), full], name))
    for node in nodes:
        function.append(node)
    function.outputs[:1] = results


def _rewire(model: ir.Model) -> None:
    """Call the changed functions: four values go from layer to layer."""
    graph = model.graph
    pending: list[ir.Value] = []
    replaced: list[ir.Node] = []
    for node in list(graph):
        if not node.op_type.startswith((EMBED, LAYER_PREFIX, HEAD)):
            continue
        inputs = list(node.inputs) if node.op_type == EMBED else [*pending, *node.inputs[1:]]
        kept = list(node.outputs) if node.op_type == HEAD else list(node.outputs[1:])
        count = len(kept) + (0 if node.op_type == HEAD else len(_PENDING))
        call = ir.Node(node.domain, node.op_type, inputs, num_outputs=count, name=node.name)
        call.metadata_props.update(node.metadata_props)
        new = list(call.outputs[count - len(kept) :])
        for before, after in zip(kept, new, strict=True):
            after.name, after.type, after.shape = before.name, before.type, before.shape
        if node.op_type != HEAD:
            pending = list(call.outputs[: len(_PENDING)])
            for name, value in zip(("output", "streams", "post", "comb"), pending, strict=True):
                value.name = f"{node.name}.pending.{name}"
        graph.insert_before(node, call)
        ir.convenience.replace_all_uses_with(kept, new, replace_graph_outputs=True)
        replaced.append(node)
    graph.remove(replaced, safe=True)
