"""`OpSpec`: the one definition of a custom op, from which every binding of it is derived.

Torch-free: ports, symbolic shapes and dtypes are plain data, usable by the runtime, the passes and
the TensorRT plugins on machines with neither torch nor onnx.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

DOMAIN = "v4graph"
OPSET = 24

DTypeName = Literal["float32", "bfloat16", "int8", "int32", "int64"]

F32: tuple[DTypeName, ...] = ("float32",)
I8: tuple[DTypeName, ...] = ("int8",)
I32: tuple[DTypeName, ...] = ("int32",)
I64: tuple[DTypeName, ...] = ("int64",)
# The graph's dtype: one choice per node, the same for every port of this kind.
FLOAT: tuple[DTypeName, ...] = ("float32", "bfloat16")
# A matrix in the dtype that the checkpoint stores, chosen by port and whatever the graph's is; the first is
# the usual one. In float32 graphs bfloat16 matrices give the very numbers of their float32 copies.
WEIGHT: tuple[DTypeName, ...] = ("bfloat16", "float32")
# e8m0 bytes, or the F32 scales of Base checkpoints.
SCALE: tuple[DTypeName, ...] = ("int8", "float32")

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate_dim(text: str, symbols: Mapping[str, Any]) -> Any:
    """Evaluate one dimension such as `"2*I"`, `"S"` or `"128"`.

    `symbols` maps names to ints or to anything with `+ - * //` (torch.SymInt, IDimensionExpr).

    Raises:
        KeyError: a symbol has no value.
        ValueError: the text is not a sum, product or floor division of names and integers.
    """

    def walk(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return symbols[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"dimension '{text}' is not made of names, integers and + - * //")

    return walk(ast.parse(text, mode="eval").body)


@dataclass(frozen=True)
class Port:
    """One input or output: its name, the dtypes it takes, its symbolic shape ("B S H*Dh").

    `alias` names the input whose buffer an output may share (caches updated in place).
    """

    name: str
    dtypes: tuple[DTypeName, ...]
    shape: str
    alias: str = ""

    @property
    def dims(self) -> tuple[str, ...]:
        """The dimensions, one expression each; empty for a scalar."""
        return tuple(self.shape.split())

    @property
    def is_float(self) -> bool:
        """Whether the port has the graph's dtype."""
        return self.dtypes == FLOAT


@dataclass(frozen=True)
class Part:
    """One call inside a fused op.

    `inputs` and `outputs` name ports of the fused op, or values that one part hands to a later one. An
    attribute is a value, or "@name" for the fused op's attribute of that name.
    """

    spec: OpSpec
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def attribute_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the call's attributes in order, for the fused op's attribute `values`."""
        return {
            name: values[value[1:]] if isinstance(value, str) and value.startswith("@") else value
            for name, value in ((name, self.attributes[name]) for name in self.spec.attributes)
        }


@dataclass(frozen=True)
class OpSpec:
    """Contract of one custom op.

    Attributes:
        name: ONNX op type and TensorRT plugin name.
        version: Opset version of `DOMAIN` and plugin version.
        inputs, outputs: Ports in order; the arity is fixed and every output is named on a node.
        attributes: Name to `int`, `float` or `str`, in the order of the reference's last parameters.
        reference: Torch function that defines the numbers: inputs, then attributes.
        tolerance: `{dtype of the FLOAT ports: (rtol, atol)}` that every other implementation meets.
        flips: Share of the elements that may leave the tolerance by one step of a quantiser, where
            the op rounds a value that it computed: an ulp before can be a step after.
        structural: Attributes that choose the code path of the reference. Each combination gets a
            body of its own; the other attributes are parameters of the body.
        body: Returns the text of a hand-written ONNX function for a variant (`{"dtype": ...}` and
            the structural attributes), used
            instead of exporting the reference; None exports the reference.
        parts: The calls that a fused op stands for, in order; empty for other ops.
    """

    name: str
    version: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    attributes: Mapping[str, type]
    reference: Callable[..., Any]
    tolerance: Mapping[str, tuple[float, float]]
    flips: float = 0.0
    structural: tuple[str, ...] = ()
    body: Callable[[Mapping[str, Any]], str] | None = None
    parts: tuple[Part, ...] = ()

    def bind_shapes(self, shapes: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Return the value of every symbol that the input shapes fix (plain names only).

        Raises:
            ValueError: an input has another rank than its port, or a literal dimension differs.
        """
        symbols: dict[str, Any] = {}
        for port in self.inputs:
            shape = shapes[port.name]
            if len(shape) != len(port.dims):
                raise ValueError(f"{self.name}.{port.name}: rank {len(shape)}, expected '{port.shape}'")
            for dim, size in zip(port.dims, shape, strict=True):
                if dim.isidentifier():
                    symbols.setdefault(dim, size)
                elif dim.isdigit() and isinstance(size, int) and size != int(dim):
                    raise ValueError(f"{self.name}.{port.name}: dimension {size}, expected {dim}")
        return symbols

    def output_shapes(
        self, shapes: Mapping[str, tuple[Any, ...]], attributes: Mapping[str, Any]
    ) -> list[tuple[Any, ...]]:
        """Return the shape of each output from the input shapes and the attributes."""
        symbols = {**self.bind_shapes(shapes), **attributes}
        return [tuple(evaluate_dim(dim, symbols) for dim in port.dims) for port in self.outputs]
