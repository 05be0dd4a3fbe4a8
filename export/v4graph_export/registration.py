"""Torch operators, fake kernels, ONNX schemas and translations, all derived from `OpSpec`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript.onnx_opset import opset24

from v4graph.ops import ALL_OPS, DOMAIN, OpSpec, Port
from v4graph.ops import stable_topk as topk

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}
_ONNX_TYPES = {
    "float32": "tensor(float)",
    "bfloat16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}
_SCHEMA_TYPES = {int: "SymInt", float: "float", str: "str"}


def torch_name(spec: OpSpec) -> str:
    """Return the torch operator name: V4Fp8Linear -> v4_fp8_linear."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", spec.name).lower()


def operator(spec: OpSpec) -> Callable[..., Any]:
    """Return the registered torch operator of an op; it takes tensors and attributes in order."""
    register()
    found: Callable[..., Any] = getattr(getattr(torch.ops, DOMAIN), torch_name(spec)).default
    return found


def graph_float(spec: OpSpec, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """Return the dtype of the FLOAT ports of a call, read off its first such input."""
    for port in spec.inputs:
        if port.is_float:
            return dtypes[port.name]
    return torch.float32


def _output_dtype(port: Port, float_dtype: torch.dtype) -> torch.dtype:
    return float_dtype if port.is_float else TORCH_DTYPES[port.dtypes[0]]


def _torch_schema(spec: OpSpec) -> str:
    ports = [f"Tensor {port.name}" for port in spec.inputs]
    attributes = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in spec.attributes.items()]
    returns = ", ".join("Tensor" for _ in spec.outputs)
    return f"({', '.join(ports + attributes)}) -> {returns if len(spec.outputs) == 1 else f'({returns})'}"


def _fake(spec: OpSpec) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        tensors = dict(zip((port.name for port in spec.inputs), args, strict=False))
        attributes = dict(zip(spec.attributes, args[len(spec.inputs) :], strict=True))
        shapes = spec.output_shapes({name: tuple(t.shape) for name, t in tensors.items()}, attributes)
        dtype = graph_float(spec, {name: t.dtype for name, t in tensors.items()})
        outputs = tuple(
            args[0].new_empty(shape, dtype=_output_dtype(port, dtype))
            for port, shape in zip(spec.outputs, shapes, strict=True)
        )
        return outputs if len(outputs) > 1 else outputs[0]

    return fake


@functools.cache
def register() -> None:
    """Register every op and the internal top-k with torch; later calls do nothing."""
    for spec in ALL_OPS:
        name = f"{DOMAIN}::{torch_name(spec)}"
        torch.library.custom_op(name, spec.reference, mutates_args=(), schema=_torch_schema(spec))
        torch.library.register_fake(name, _fake(spec))
    torch.library.custom_op(topk.OPERATOR, topk.sort_and_cut, mutates_args=(), schema=topk.SCHEMA)

    def fake_topk(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (*x.shape[:-1], k)
        return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)

    torch.library.register_fake(topk.OPERATOR, fake_topk)


def onnx_schema(spec: OpSpec) -> onnx.defs.OpSchema:
    """Return the ONNX schema; ports of the graph's dtype share one type variable."""
    schema = onnx.defs.OpSchema
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT, str: schema.AttrType.STRING}

    def variable(port: Port) -> str:
        return "T" if port.is_float else f"T_{port.name}"

    constraints = {
        variable(port): [_ONNX_TYPES[name] for name in port.dtypes] for port in (*spec.inputs, *spec.outputs)
    }
    return schema(
        spec.name,
        DOMAIN,
        spec.version,
        inputs=[schema.FormalParameter(p.name, variable(p), f"[{p.shape}]") for p in spec.inputs],
        outputs=[schema.FormalParameter(p.name, variable(p), f"[{p.shape}]") for p in spec.outputs],
        type_constraints=[(name, types, "") for name, types in constraints.items()],
        attributes=[schema.Attribute(k, kinds[t], k, required=True) for k, t in spec.attributes.items()],
    )


def _translate(spec: OpSpec) -> Callable[..., Any]:
    call = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), spec.name, onnx_schema(spec))

    def translate(*args: Any) -> Any:
        count = len(spec.inputs)
        return call(*args[:count], **dict(zip(spec.attributes, args[count:], strict=True)))

    return translate


def _translate_topk(x: Any, k: Any) -> Any:
    flat: Any = opset24.Constant(value_ints=[-1])
    count: Any = opset24.Constant(value_ints=[k]) if isinstance(k, int) else opset24.Reshape(k, flat)
    return opset24.TopK(x, count, axis=-1, largest=1, sorted=1)


def _translate_remainder(x: Any, divisor: Any) -> Any:
    """Integer remainder with the divisor's sign; torch's own translation takes no symbolic divisor."""
    return opset24.Mod(x, opset24.Constant(value_int=divisor) if isinstance(divisor, int) else divisor)


@functools.cache
def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the table for `torch.onnx.export(custom_translation_table=...)`."""
    register()
    table: dict[Any, Callable[..., Any]] = {operator(spec): _translate(spec) for spec in ALL_OPS}
    namespace, name = topk.OPERATOR.split("::")
    table[getattr(getattr(torch.ops, namespace), name).default] = _translate_topk
    table[torch.ops.aten.remainder.Scalar] = _translate_remainder
    return table
