"""Remove state and function ports that the logits never depend on.

Before: a model without CSA layers that carries `state.0.index_keys` to `next.0.index_keys`. After: neither is
there. A state is live if the logits, or a live state's next value, are computed from it. Inputs that a layer
function does not read and outputs that no call uses go first; weights that nothing reads any more go last.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from v4graph.ops import DOMAIN
from v4graph.passes.facts import LAYER_PREFIX, drop_unread_inputs

_NEXT = re.compile(r"next\.(.+)")


class RemoveDeadStates(ir.passes.InPlacePass):
    """Removes states, weights and function ports that change nothing."""

    def __repr__(self) -> str:
        return "RemoveDeadStates"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change `model` in place."""
        modified = False
        while _step(model):
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _step(model: ir.Model) -> bool:
    dead = _dead_states(model)
    for following in dead:
        model.graph.outputs.remove(following)
    changed = bool(dead)
    for function in list(model.functions.values()):
        calls = list(_calls(model, function))
        if function.domain == DOMAIN and calls:
            changed |= _trim(function, calls)
    RemoveUnusedNodesPass()(model)
    return drop_unread_inputs(model) or changed


def _calls(model: ir.Model, function: ir.Function) -> Iterator[ir.Node]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.op_identifier() == function.identifier():
                yield node


def _dead_states(model: ir.Model) -> list[ir.Value]:
    """Return the next values of the states that reach no logits."""
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    states = []
    for value in graph.outputs:
        found = _NEXT.fullmatch(value.name or "")
        if found and f"state.{found[1]}" in inputs:
            states.append((inputs[f"state.{found[1]}"], value))
    others = [value for value in graph.outputs if all(value is not following for _, following in states)]
    live: set[ir.Value] = set()
    seen: set[ir.Value] = set()
    queue = list(others)
    while queue:
        value = queue.pop()
        if value in seen:
            continue
        seen.add(value)
        queue += _sources(model, value)
        for state, following in states:
            if value is state and state not in live:
                live.add(state)
                queue.append(following)
    return [following for state, following in states if state not in live]


def _sources(model: ir.Model, value: ir.Value) -> list[ir.Value]:
    """Return what a value is computed from: all inputs of its node, or of a function those it depends on."""
    node = value.producer()
    if node is None:
        return []
    function = model.functions.get(node.op_identifier())
    if function is None or function.domain != DOMAIN:
        return [one for one in node.inputs if one is not None]
    output = function.outputs[list(node.outputs).index(value)]
    reached = _reached(output, lambda one: _sources(model, one))
    return [
        given for given, own in zip(node.inputs, function.inputs, strict=True) if own in reached and given
    ]


def _reached(value: ir.Value, sources: Callable[[ir.Value], list[ir.Value]]) -> set[ir.Value]:
    seen: set[ir.Value] = set()
    queue = [value]
    while queue:
        one = queue.pop()
        if one not in seen:
            seen.add(one)
            queue += sources(one)
    return seen


def _trim(function: ir.Function, calls: list[ir.Node]) -> bool:
    """Drop outputs that no call uses, then inputs that the function does not read."""
    if not function.name.startswith(LAYER_PREFIX):
        return False
    unused = [
        i
        for i in range(len(function.outputs))
        if all(not call.outputs[i].uses() and not call.outputs[i].is_graph_output() for call in calls)
    ]
    kept = [value for i, value in enumerate(function.outputs) if i not in unused]
    function.outputs[:] = kept
    if unused:
        RemoveUnusedNodesPass()(ir.Model(function.graph, ir_version=10))
    unread = [
        i for i, value in enumerate(function.inputs) if not value.uses() and all(value is not v for v in kept)
    ]
    if not unused and not unread:
        return False
    function.inputs[:] = [value for i, value in enumerate(function.inputs) if i not in unread]
    for call in calls:
        _recall(call, unread, unused)
    return True


def _recall(call: ir.Node, unread: list[int], unused: list[int]) -> None:
    """Call the trimmed function instead."""
    kept = [value for i, value in enumerate(call.outputs) if i not in unused]
    inputs = [value for i, value in enumerate(call.inputs) if i not in unread]
    node = ir.Node(call.domain, call.op_type, inputs, num_outputs=len(kept), name=call.name)
    node.metadata_props.update(call.metadata_props)
    for before, after in zip(kept, node.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
    graph = call.graph
    assert graph is not None
    graph.insert_before(call, node)
    ir.convenience.replace_all_uses_with(kept, node.outputs, replace_graph_outputs=True)
    graph.remove(call, safe=True)
