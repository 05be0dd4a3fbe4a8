"""TensorRT's dimension expressions as Python numbers, for `OpSpec.output_shapes`."""

from __future__ import annotations

from typing import Any


class Dim:
    """Wraps an IDimensionExpr; + - * // with other dims and ints build new expressions."""

    def __init__(self, trt: Any, builder: Any, expression: Any) -> None:
        self.trt, self.builder, self.expression = trt, builder, expression

    @classmethod
    def of(cls, trt: Any, builder: Any, value: Any) -> Any:
        """Return a known dimension as int and any other wrapped."""
        return int(value.get_constant_value()) if value.is_constant() else cls(trt, builder, value)

    def _with(self, operation: str, left: Any, right: Any) -> Dim:
        operator = getattr(self.trt.DimensionOperation, operation)
        operands = (expression(self.builder, value) for value in (left, right))
        return Dim(self.trt, self.builder, self.builder.operation(operator, *operands))

    def __add__(self, other: Any) -> Dim:
        return self._with("SUM", self, other)

    def __radd__(self, other: Any) -> Dim:
        return self._with("SUM", other, self)

    def __sub__(self, other: Any) -> Dim:
        return self._with("SUB", self, other)

    def __rsub__(self, other: Any) -> Dim:
        return self._with("SUB", other, self)

    def __mul__(self, other: Any) -> Dim:
        return self._with("PROD", self, other)

    def __rmul__(self, other: Any) -> Dim:
        return self._with("PROD", other, self)

    def __floordiv__(self, other: Any) -> Dim:
        return self._with("FLOOR_DIV", self, other)

    def __rfloordiv__(self, other: Any) -> Dim:
        return self._with("FLOOR_DIV", other, self)


def expression(builder: Any, value: Any) -> Any:
    """Return an int or a `Dim` as an IDimensionExpr of `builder`."""
    return value.expression if isinstance(value, Dim) else builder.constant(int(value))
