"""Inline the layer functions, and name every node after its layer and its weight.

Before: one call per layer, `layers.3 = V4Layer_csa_topk(...)`. After: the nodes of that layer, such as
`layers.3.attn.wq_a/V4Fp8Linear`, so that a backend's messages, profiles and errors say which one they mean.
Bodies of custom ops stay functions.
"""

from __future__ import annotations

import re
from collections import Counter

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from v4graph.ops import DOMAIN
from v4graph.passes.facts import KIND, LAYER, LAYER_PREFIX, plain_name

_PREFIXES = (LAYER_PREFIX, "V4Embed", "V4Head")


class InlineLayers(ir.passes.InPlacePass):
    """Inlines V4Embed, V4Layer_* and V4Head."""

    def __repr__(self) -> str:
        return "InlineLayers"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Inline `model` in place."""
        for node in model.graph:
            if _is_layer(node.domain, node.op_type):
                node.metadata_props[LAYER] = node.name or node.op_type
                node.metadata_props[KIND] = node.op_type.removeprefix(LAYER_PREFIX)
        result = InlinePass(lambda function: _is_layer(function.domain, function.name))(model)
        if result.modified:
            _name_nodes(model)
        return ir.passes.PassResult(model, modified=result.modified)


def _is_layer(domain: str, name: str) -> bool:
    return domain == DOMAIN and name.startswith(_PREFIXES)


def _name_nodes(model: ir.Model) -> None:
    weights = {value for value in model.graph.inputs if value.name and "." in value.name}
    weights |= set(model.graph.initializers.values())
    seen: Counter[str] = Counter()
    for node in model.graph:
        layer = node.metadata_props.get(LAYER)
        if layer is None:
            continue
        name = f"{_owner(node, layer, weights)}/{plain_name(node.op_type)}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}.{seen[name]}"
        for value in node.outputs:
            if value.name and not value.is_graph_output() and not value.name.startswith(layer):
                # The inliner made v5 of the layer function unique as v5_17.
                value.name = f"{layer}.{re.sub(r'_[0-9]+$', '', value.name)}"


def _owner(node: ir.Node, layer: str, weights: set[ir.Value]) -> str:
    """Return the module of the node's first weight: layers.3.attn.wq_a; the layer if it reads none."""
    for value in node.inputs:
        name = value.name if value in weights and value is not None else None
        if name and not name.startswith(("rope.", "state.")):
            return name.rpartition(".")[0] or layer
    return layer
