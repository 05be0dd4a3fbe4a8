"""V4GroupedOutput and V4Fp8GroupedOutput: block-diagonal low-rank output projection (wo_a).

Source: spec section 2.2, output. The FP8 weight is dequantised to the graph's dtype and the
activations are not quantised, as in the official code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.rounding import decode_fp8
from v4graph.ops.spec import FLOAT, I8, SCALE, WEIGHT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def grouped_output(o: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return z [B, S, G*R]: heads in order form G groups, each with its own rows of `weight` [G*R, H*D/G]."""
    batch, tokens = o.shape[0], o.shape[1]
    rows, width = weight.shape
    x = o.float().reshape(batch * tokens, groups, width).transpose(0, 1)
    w = weight.float().reshape(groups, rows // groups, width).transpose(1, 2)
    return (x @ w).transpose(0, 1).reshape(batch, tokens, rows).to(o.dtype)


def fp8_grouped_output(o: Tensor, weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Return z [B, S, G*R] for an FP8 weight; see `grouped_output`."""
    return grouped_output(o, decode_fp8(weight, scale).to(o.dtype), groups)


_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)}

OP = OpSpec(
    name="V4GroupedOutput",
    version=1,
    inputs=(Port("o", FLOAT, "B S H Dh"), Port("weight", WEIGHT, "O K")),
    outputs=(Port("z", FLOAT, "B S O"),),
    attributes={"groups": int},
    reference=grouped_output,
    tolerance=_TOLERANCE,
)

FP8_OP = OpSpec(
    name="V4Fp8GroupedOutput",
    version=1,
    inputs=(Port("o", FLOAT, "B S H Dh"), Port("weight", I8, "O K"), Port("scale", SCALE, "OB KB")),
    outputs=(Port("z", FLOAT, "B S O"),),
    attributes={"groups": int},
    reference=fp8_grouped_output,
    tolerance=_TOLERANCE,
)
