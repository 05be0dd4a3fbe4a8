"""The ONNX body of every op gives the reference's numbers in onnxruntime."""

from __future__ import annotations

import ast

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from op_cases import OpCase, all_cases, as_numpy

from v4graph.ops import ALL_OPS, DOMAIN
from v4graph.ops.tolerance import mismatch
from v4graph.verify.graph_runner import fed
from v4graph_export import bodies
from v4graph_export.functions import OPSETS

CASES = list(all_cases())
_ONNX = {torch.float32: ir.DataType.FLOAT, torch.int8: ir.DataType.INT8, torch.bfloat16: ir.DataType.BFLOAT16}
_ONNX |= {torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64}


def run_body(case: OpCase, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """Run one op through its function body in onnxruntime."""
    values = [
        ir.Value(name=name, type=ir.TensorType(_ONNX[t.dtype]), shape=ir.Shape([None] * t.dim()))
        for name, t in inputs.items()
    ]
    attributes = [ir.convenience.convert_attribute(k, v) for k, v in case.attributes.items()]
    node = ir.Node(DOMAIN, case.op, values, attributes, num_outputs=len(case.spec.outputs))
    for value, port in zip(node.outputs, case.spec.outputs, strict=True):
        value.name = f"out_{port.name}"
        dtype = ir.DataType.INT32 if port.dtypes == ("int32",) else ir.DataType.FLOAT
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([None] * len(port.dims))
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=dict(OPSETS), name="one_op")
    holder = ir.Function("test", "holder", graph=graph, attributes=[])
    functions = bodies.attach_bodies([holder], "float32", case.scale)
    model = ir.Model(graph, ir_version=10, functions=functions)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, fed({name: as_numpy(t) for name, t in inputs.items()}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_body_equals_reference(case: OpCase) -> None:
    inputs = case.inputs()
    expected = case.reference(inputs)
    for got, want, port in zip(run_body(case, inputs), expected, case.spec.outputs, strict=True):
        assert not mismatch(case.spec, got, want.numpy(), case.attributes), port.name


def test_every_op_and_shipped_variant_has_a_case() -> None:
    assert {case.op for case in CASES} == {spec.name for spec in ALL_OPS}
    shipped = {variant.name for variant in bodies.shipped_variants("float32")}
    # The MoE wrapper is one text; its float32-scale form differs only in the expert function it calls.
    assert shipped - {case.variant.name for case in CASES} == {"V4MoE__scale_float32"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shipped_set_is_complete_and_current(dtype: str) -> None:
    shipped = onnx.load(bodies.FOLDER / f"{dtype}.onnx")
    properties = {entry.key: entry.value for entry in shipped.metadata_props}
    assert properties["v4graph.ops_sha256"] == bodies.ops_sha256(), "run `make bodies`"
    assert [f.name for f in shipped.functions] == [v.name for v in bodies.shipped_variants(dtype)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prebuilt_equals_regenerated(dtype: str) -> None:
    shipped = onnx.load(bodies.FOLDER / f"{dtype}.onnx")
    for ours, again in zip(shipped.functions, bodies.build_all(dtype).functions, strict=True):
        assert ours.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True), (
            ours.name
        )


def test_the_hash_of_the_ops_does_not_depend_on_the_python() -> None:
    """What ast.dump prints does: 3.12 added a field to functions, 3.13 leaves empty ones out."""
    tree = ast.parse("def f(x):\n    return [x]")
    call = "(Return value=(List elts=[(Name id='x' ctx=(Load ))] ctx=(Load )))"
    arguments = "(arguments args=[(arg arg='x')])"
    assert bodies._dump(tree) == f"(Module body=[(FunctionDef name='f' args={arguments} body=[{call}])])"
