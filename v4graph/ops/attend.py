"""Softmax over several key sets with a per-head sink, and the inverse rotation of the output.

Source: spec section 2.2; the sink adds exp(sink) to the denominator and has no value vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def shared_scores(q: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Scores [B, S, H, n] of all heads against keys [B, n, D] shared by the queries of a slot."""
    batch, tokens, heads, width = q.shape
    count = keys.shape[1]
    product = q.float().reshape(batch, tokens * heads, width) @ keys.float().transpose(1, 2)
    scores = product.reshape(batch, tokens, heads, count) * scale
    return torch.where(visible[:, :, None], scores, -torch.inf)


def shared_values(p: Tensor, keys: Tensor) -> Tensor:
    """Weighted sum [B, S, H, D] of shared keys [B, n, D] under p [B, S, H, n]."""
    batch, tokens, heads, count = p.shape
    total = p.reshape(batch, tokens * heads, count) @ keys.float()
    return total.reshape(batch, tokens, heads, keys.shape[2])


def sink_softmax(scores: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """Return exp(s - max) [B, S, H, n] and the denominator [B, S, H, 1] with the sink's share."""
    peak = scores.amax(-1, keepdim=True)
    p = (scores - peak).exp()
    return p, p.sum(-1, keepdim=True) + (sink[:, None] - peak).exp()
