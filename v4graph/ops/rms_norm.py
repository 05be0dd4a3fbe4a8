"""V4RmsNorm: weighted RMS norm in float32 with one cast out (the query latent).

Source: spec section 2.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops import positional
from v4graph.ops.spec import FLOAT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * weight, [B, S, D]."""
    return positional.rms_norm(x, weight, eps).to(x.dtype)


OP = OpSpec(
    name="V4RmsNorm",
    version=1,
    inputs=(Port("x", FLOAT, "B S D"), Port("weight", FLOAT, "D")),
    outputs=(Port("y", FLOAT, "B S D"),),
    attributes={"eps": float},
    reference=rms_norm,
    tolerance={"float32": (1e-5, 1e-6), "bfloat16": (1.6e-2, 1e-3)},
)
