"""V4ExpertFp4, V4ExpertFp8, V4ExpertFloat: one expert on the rows routed to it.

The bodies of the MoE ops call these; a kernel replaces the MoE op as a whole. Source: spec section
3: clamp, silu, routing weight before the down projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from v4graph.ops import rounding
from v4graph.ops.lazy import torch
from v4graph.ops.positional import sigmoid
from v4graph.ops.spec import F32, FLOAT, I8, SCALE, WEIGHT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def _swiglu(gate: Tensor, value: Tensor, weight: Tensor, limit: float) -> Tensor:
    """Return silu(min(gate, limit)) * clamp(value) * weight, float32 [N, I]; weight is [N]."""
    gate, value = gate.float().clamp(max=limit), value.float().clamp(-limit, limit)
    return gate * sigmoid(gate) * value * weight[:, None]


def _quantised(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the reference of an expert whose matrices `linear` multiplies by.

    Float32 [N, D] for rows x [N, D] and routing weights [N].
    """

    def reference(
        x: Tensor,
        weight: Tensor,
        w1: Tensor,
        w1_scale: Tensor,
        w3: Tensor,
        w3_scale: Tensor,
        w2: Tensor,
        w2_scale: Tensor,
        limit: float,
    ) -> Tensor:
        rows = x.float()
        gate, value = linear(rows, w1, w1_scale).to(x.dtype), linear(rows, w3, w3_scale).to(x.dtype)
        inner = _swiglu(gate, value, weight, limit).to(x.dtype).float()
        return linear(inner, w2, w2_scale).to(x.dtype).float()

    return reference


expert_fp4 = _quantised(rounding.fp4_linear)
expert_fp8 = _quantised(rounding.fp8_linear)


def expert_float(x: Tensor, weight: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, limit: float) -> Tensor:
    """Return float32 [N, D] for rows [N, D] with routing weights [N] and float matrices."""
    linear = torch.nn.functional.linear
    rows = x.float()
    inner = _swiglu(linear(rows, w1.float()), linear(rows, w3.float()), weight, limit)
    return linear(inner, w2.float())


_ROWS = (Port("x", FLOAT, "N D"), Port("weight", F32, "N"))
_OUT = (Port("y", F32, "N D"),)
_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)}

FP4_OP = OpSpec(
    name="V4ExpertFp4",
    version=1,
    inputs=(
        *_ROWS,
        Port("w1", I8, "I D2"),
        Port("w1_scale", I8, "I DS"),
        Port("w3", I8, "I D2"),
        Port("w3_scale", I8, "I DS"),
        Port("w2", I8, "D I2"),
        Port("w2_scale", I8, "D IS"),
    ),
    outputs=_OUT,
    attributes={"limit": float},
    reference=expert_fp4,
    tolerance=_TOLERANCE,
    flips=2e-2,
)

FP8_OP = OpSpec(
    name="V4ExpertFp8",
    version=1,
    inputs=(
        *_ROWS,
        Port("w1", I8, "I D"),
        Port("w1_scale", SCALE, "IB DB"),
        Port("w3", I8, "I D"),
        Port("w3_scale", SCALE, "IB DB"),
        Port("w2", I8, "D I"),
        Port("w2_scale", SCALE, "DB IB"),
    ),
    outputs=_OUT,
    attributes={"limit": float},
    reference=expert_fp8,
    tolerance=_TOLERANCE,
    flips=2e-2,
)

FLOAT_OP = OpSpec(
    name="V4ExpertFloat",
    version=1,
    inputs=(*_ROWS, Port("w1", WEIGHT, "I D"), Port("w3", WEIGHT, "I D"), Port("w2", WEIGHT, "D I")),
    outputs=_OUT,
    attributes={"limit": float},
    reference=expert_float,
    tolerance=_TOLERANCE,
)
