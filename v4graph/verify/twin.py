"""A bf16 graph in float32: the same nodes, for a machine whose onnxruntime has no bf16.

A graph computes in the dtype of its states, so that is how one is told; the matrices that a float32
graph takes as bf16 are only read.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_BF16, _F32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def float32_twin(model: ir.Model) -> bool:
    """Change a bf16 model in place so that all of it is float32; return whether it was one."""
    states = [value for value in model.graph.inputs if (value.name or "").startswith("state.")]
    if not any(value.dtype == _BF16 for value in states):
        return False
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for value in model.graph.initializers.values():
        _widen(value)
    for graph in graphs:
        for value in graph.inputs:
            _widen(value)
        for node in ir.traversal.RecursiveGraphIterator(graph):
            _node(node)
    return True


def _widen(value: ir.Value) -> None:
    if value.dtype == _BF16:
        value.type = ir.TensorType(_F32)


def _node(node: ir.Node) -> None:
    for value in node.outputs:
        _widen(value)
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if name in ("to", "dtype") and attribute.value == int(_BF16):
            node.attributes[name] = ir.AttrInt64(name, int(_F32))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == _BF16:
            wide = attribute.value.numpy().view(ml_dtypes.bfloat16).astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(wide))
