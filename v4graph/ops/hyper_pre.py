"""V4HyperPre: mix the residual streams into one sublayer input and normalise it.

Source: spec section 2.1, steps 1 to 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch
from v4graph.ops.positional import rms_norm, sigmoid
from v4graph.ops.spec import F32, FLOAT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor

STREAMS = 4


def group_sums() -> tuple[Tensor, Tensor]:
    """Matrices [16, 16] that replace each entry of a flat 4x4 by its row sum, or column sum."""
    ones, eye = torch.ones(STREAMS, STREAMS), torch.eye(STREAMS)
    return torch.kron(eye, ones), torch.kron(ones, eye)


def sinkhorn(mixes: Tensor, iters: int, eps: float) -> Tensor:
    """Alternate row and column normalisation of [B, S, 16], ending on columns.

    Sums over tiny axes are slow everywhere; a product with a constant matrix is not.
    """
    rows, columns = group_sums()
    square = mixes.reshape(*mixes.shape[:-1], STREAMS, STREAMS)
    c = square.softmax(-1).reshape(mixes.shape) + eps
    c = c / (c @ columns + eps)
    for _ in range(iters - 1):
        c = c / (c @ rows + eps)
        c = c / (c @ columns + eps)
    return c


def hyper_mixes(x: Tensor, fn: Tensor, eps: float) -> Tensor:
    """Return (fn v) / rms(v), float32 [B, S, M], for v = the streams [B, S, 4, D] laid end to end.

    fp64: the streams have outliers, and 24 numbers scale everything that follows. Summed in fp32, two
    right implementations differ by an ulp that flips FP8 codes downstream (docs/design-notes).
    """
    v = x.double().flatten(2)
    mixes = torch.nn.functional.linear(v, fn.double()) * torch.rsqrt((v * v).mean(-1, keepdim=True) + eps)
    return mixes.float()


def hyper_pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor, iters: int, eps: float, hc_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normed sublayer input [B,S,D], post [B,S,4] and comb [B,S,4,4] (first index: source)."""
    m = hyper_mixes(x, fn, eps)
    n = STREAMS
    pre = sigmoid(m[..., :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn(m[..., 2 * n :] * scale[2] + base[2 * n :], iters, hc_eps)
    mixed = (pre[..., None] * x.float()).sum(2).to(x.dtype)
    y = rms_norm(mixed, norm, eps).to(x.dtype)
    return y, post, comb.reshape(*comb.shape[:-1], n, n)


OP = OpSpec(
    name="V4HyperPre",
    version=1,
    inputs=(
        Port("x", FLOAT, "B S 4 D"),
        Port("fn", F32, "24 4*D"),
        Port("base", F32, "24"),
        Port("scale", F32, "3"),
        Port("norm", FLOAT, "D"),
    ),
    outputs=(Port("y", FLOAT, "B S D"), Port("post", F32, "B S 4"), Port("comb", F32, "B S 4 4")),
    attributes={"iters": int, "eps": float, "hc_eps": float},
    reference=hyper_pre,
    tolerance={"float32": (1e-4, 1e-5), "bfloat16": (1.6e-2, 1e-3)},
    structural=("iters",),
)
