"""A bf16 graph in float32: the same nodes, for a machine whose onnxruntime has no bf16."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_BF16, _F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def float32_twin(model: ir.Model) -> bool:
    """Change a model in place so that what was bf16 is float32; return whether anything was."""
    changed = False
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        changed |= _widen(value)
    for graph in graphs:
        for value in graph.inputs:
            changed |= _widen(value)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            changed |= _node(node)
    return changed


def _widen(value: ir.Value) -> bool:
    if value.dtype != _BF16:
        return False
    value.type = ir.TensorType(_F32)
    return True


def _node(node: ir.Node) -> bool:
    changed = any(list(map(_widen, node.outputs)))
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if name in ("to", "dtype") and attribute.value == int(_BF16):
            node.attributes[name] = ir.AttrInt64(name, int(_F32))
            changed = True
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
            wide = attribute.value.numpy().view(ml_dtypes.bfloat16).astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))
            changed = True
    return changed
