"""V4Fp8Linear: FP8 block linear with the 1x128 activation quantisation inside.

Source: spec section 2.0, QLinear. Weights travel as the checkpoint's bytes (int8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops import rounding
from v4graph.ops.spec import FLOAT, I8, SCALE, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x W^T, [B, S, O]; K is a multiple of 128, O need not be."""
    return rounding.fp8_linear(x.float(), weight, scale).to(x.dtype)


OP = OpSpec(
    name="V4Fp8Linear",
    version=1,
    inputs=(Port("x", FLOAT, "B S K"), Port("weight", I8, "O K"), Port("scale", SCALE, "OB KB")),
    outputs=(Port("y", FLOAT, "B S O"),),
    attributes={},
    reference=fp8_linear,
    tolerance={"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)},
)
