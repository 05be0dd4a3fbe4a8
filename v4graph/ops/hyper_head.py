"""V4HyperHead: collapse the streams after the last layer and apply the final norm.

Source: spec section 2.1, head collapse: no Sinkhorn and no factor 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.hyper_pre import hyper_mixes
from v4graph.ops.positional import rms_norm, sigmoid
from v4graph.ops.spec import F32, FLOAT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def hyper_head(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, eps: float, hc_eps: float
) -> Tensor:
    """Return the normed final hidden state [B, S, D]."""
    weights = sigmoid(hyper_mixes(x, fn, eps) * scale + base) + hc_eps
    mixed = (weights[..., None] * x.float()).sum(2).to(x.dtype)
    return rms_norm(mixed, norm, eps).to(x.dtype)


OP = OpSpec(
    name="V4HyperHead",
    version=1,
    inputs=(
        Port("x", FLOAT, "B S 4 D"),
        Port("fn", F32, "4 4*D"),
        Port("base", F32, "4"),
        Port("scale", F32, "1"),
        Port("norm", FLOAT, "D"),
    ),
    outputs=(Port("y", FLOAT, "B S D"),),
    attributes={"eps": float, "hc_eps": float},
    reference=hyper_head,
    tolerance={"float32": (1e-4, 1e-5), "bfloat16": (1.6e-2, 1e-3)},
)
