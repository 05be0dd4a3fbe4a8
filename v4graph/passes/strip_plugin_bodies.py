"""Remove the function bodies of ops that a backend has kernels for.

Before: `V4Compress__overlap_1_quantise_kv` calls a FunctionProto of that name. After: `V4Compress`, and the
function is gone, with the functions that only it called. An op without a kernel keeps its body. TensorRT
prefers a function to a plugin of the same name in some versions and the plugin in others.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from v4graph.ops import DOMAIN
from v4graph.passes.facts import plain_name


class StripPluginBodies(ir.passes.InPlacePass):
    """Strips the ops named in `plugins`."""

    def __init__(self, plugins: Collection[str]) -> None:
        super().__init__()
        self.plugins = frozenset(plugins)

    def __repr__(self) -> str:
        return "StripPluginBodies"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strip `model` in place."""
        backed = [key for key in model.functions if key[0] == DOMAIN and plain_name(key[1]) in self.plugins]
        for key in backed:
            del model.functions[key]
        renamed = False
        graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        for graph in graphs:
            for node in ir.traversal.RecursiveGraphIterator(graph):
                name = plain_name(node.op_type)
                if node.domain == DOMAIN and name in self.plugins and node.op_type != name:
                    node.op_type, renamed = name, True
        dropped = _drop_unused(model)
        return ir.passes.PassResult(model, modified=bool(backed) or renamed or dropped)


def _drop_unused(model: ir.Model) -> bool:
    """Remove functions that nothing calls any more."""
    called: set[ir.OperatorIdentifier] = set()
    queue: list[ir.Graph | ir.Function] = [model.graph]
    while queue:
        for node in ir.traversal.RecursiveGraphIterator(queue.pop()):
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called.add(key)
                queue.append(model.functions[key])
    unused = [key for key in model.functions if key not in called]
    for key in unused:
        del model.functions[key]
    return bool(unused)
