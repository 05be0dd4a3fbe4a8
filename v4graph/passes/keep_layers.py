"""Keep some layers of a graph and drop the others, joining the streams over the gaps.

Before: embed -> layers.0 -> layers.1 -> layers.2 -> head. After keeping 0 and 2: embed -> layers.0 ->
layers.2 -> head, without the states and weights of layer 1. A transform: the logits are another model's.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass

from v4graph.errors import PassError
from v4graph.passes.facts import LAYER_PREFIX, drop_unread_inputs


class KeepLayers(ir.passes.InPlacePass):
    """Keeps the layers with the given numbers."""

    def __init__(self, layers: Collection[int]) -> None:
        super().__init__()
        self.layers = frozenset(layers)

    def __repr__(self) -> str:
        return "KeepLayers"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut `model` in place.

        Raises:
            PassError: the graph has its layers inlined, or lacks one of them.
        """
        calls = {node.name: node for node in model.graph if node.op_type.startswith(LAYER_PREFIX)}
        names = {f"layers.{i}" for i in self.layers}
        if not calls or not names <= calls.keys():
            missing = ", ".join(sorted(names - calls.keys())) or "any layer function"
            raise PassError(f"KeepLayers: the graph has no call of {missing}; give it a graph as exported.")
        dropped = [node for name, node in calls.items() if name not in names]
        for node in dropped:
            _bypass(model.graph, node)
        RemoveUnusedNodesPass()(model)
        RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
        drop_unread_inputs(model)
        return ir.passes.PassResult(model, modified=bool(dropped))


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Hand what a layer takes of the layer before on; its states' next values leave the graph."""
    count = sum(not value.is_graph_output() for value in node.outputs)
    streams = [value for value in node.inputs[:count] if value is not None]
    ir.convenience.replace_all_uses_with(list(node.outputs[:count]), streams)
    for value in node.outputs[count:]:
        graph.outputs.remove(value)
