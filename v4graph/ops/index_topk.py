"""V4IndexTopK: score the compressed entries for each query and select the best.

Source: spec section 2.4. Ties go to the lowest index; missing entries are -1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch
from v4graph.ops.positional import positions, rope, visible_blocks
from v4graph.ops.rounding import fake_fp4, hadamard_128
from v4graph.ops.spec import F32, FLOAT, I32, OpSpec, Port
from v4graph.ops.stable_topk import stable_topk

if TYPE_CHECKING:
    from torch import Tensor


def index_scores(
    q: Tensor, weights: Tensor, keys: Tensor, freqs: Tensor, start: Tensor, quantise: int, scale: float
) -> Tensor:
    """Scores float32 [B, S, N] of every key for every query, visible or not."""
    batch, tokens, _ = q.shape
    count, width = keys.shape[1], keys.shape[2]
    heads = q.shape[-1] // width
    turned = rope(q.float().reshape(batch, tokens, heads, width), positions(start, tokens), freqs).to(q.dtype)
    if quantise:
        turned = fake_fp4(hadamard_128(turned.float()).to(q.dtype).float()).to(q.dtype)
    dots = turned.float().reshape(batch, tokens * heads, width) @ keys.float().transpose(1, 2)
    gains = (weights.float() * scale).to(weights.dtype).float()
    hits = dots.reshape(batch, tokens, heads, count).relu()
    return (gains[:, :, None] @ hits).reshape(batch, tokens, count)


def index_topk(
    q: Tensor,
    weights: Tensor,
    keys: Tensor,
    freqs: Tensor,
    start: Tensor,
    topk: int,
    ratio: int,
    quantise: int,
    scale: float,
) -> Tensor:
    """Return int32 [B, S, topk] rows of `keys`, best first, -1 where fewer than topk are visible."""
    scores = index_scores(q, weights, keys, freqs, start, quantise, scale)
    batch, tokens, count = scores.shape
    scores = torch.where(visible_blocks(start, tokens, count, ratio), scores, -torch.inf)
    # topk may exceed the number of entries: pad with entries that are never visible.
    padding = scores.new_full((batch, tokens, topk), -torch.inf)
    values, rows = stable_topk(torch.cat([scores, padding], -1), topk)
    return torch.where(values == -torch.inf, -1, rows).int()


OP = OpSpec(
    name="V4IndexTopK",
    version=1,
    inputs=(
        Port("q", FLOAT, "B S Q"),
        Port("weights", FLOAT, "B S Hi"),
        Port("keys", FLOAT, "B N C"),
        Port("freqs", F32, "F"),
        Port("start", I32, "B"),
    ),
    outputs=(Port("rows", I32, "B S topk"),),
    attributes={"topk": int, "ratio": int, "quantise": int, "scale": float},
    reference=index_topk,
    tolerance={"float32": (0.0, 0.0), "bfloat16": (0.0, 0.0)},
    structural=("quantise",),
)
