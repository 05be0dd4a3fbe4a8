"""Absolute positions, RoPE, RMSNorm, sigmoid and the position-addressed rings.

Every row of a ring is addressed by position modulo its length, and masks come from positions, so a
session needs no reset and a rollback is a smaller start. Source: spec sections 2.0, 2.2, 2.7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Return x / rms(x) over the last axis, times `weight`, in float32 [same shape]."""
    x = x.float()
    y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.float()


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), spelt out.

    onnxruntime's Sigmoid is a rational approximation, off by 1e-7 of 1 wherever it is: 1e-5 of a small
    value. Through a quantiser that is enough to flip codes; its Exp is good to the last bit.
    """
    y: Tensor = 1.0 / (1.0 + (-x).exp())
    return y


def positions(start: Tensor, tokens: int) -> Tensor:
    """Absolute positions int64 [B, S] of a chunk that begins at `start` [B]."""
    return start.long()[:, None] + torch.arange(tokens)


def rope(x: Tensor, position: Tensor, freqs: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last 2F channels of float32 [B, S, (H,) D], interleaved pairs, by position.

    `freqs` is float32 [F]; the leading channels pass through. `inverse` rotates back.
    """
    rotated = 2 * freqs.shape[0]
    angle = position.float()[..., None] * freqs
    if x.dim() == 4:
        angle = angle[:, :, None]
    cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
    plain = x.shape[-1] - rotated
    head, tail = x[..., :plain], x[..., plain:]
    pairs = tail.reshape(*tail.shape[:-1], rotated // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return torch.cat([head, turned.reshape(tail.shape)], -1)


def batch_index(batch: int) -> Tensor:
    """Column [B, 1] of slot numbers, to index a per-slot row table."""
    return torch.arange(batch)[:, None]


def ring_rows(joined: Tensor, length: int, start: Tensor, count: Tensor) -> Tensor:
    """Return the ring [B, L, D] after a chunk, from `joined` = [old ring | chunk] [B, L+S, D].

    A row takes the newest position congruent to it, if the chunk's `count` valid tokens hold one.
    Old ring and chunk are joined once, for the keys too: readers of the old ring then come before
    its writer, and the new ring may share the old one's buffer.
    """
    first = start.long()[:, None]
    last = first + count.long()[:, None] - 1
    row = torch.arange(length)
    newest = last - (last - row) % length
    source = torch.where(newest >= first, length + newest - first, row)
    return joined[batch_index(joined.shape[0]), source]


def window_visibility(start: Tensor, length: int, tokens: int, window: int) -> Tensor:
    """Which of [old ring | chunk] each query sees: bool [B, S, L+S].

    A ring row holds the newest position before `start` congruent to it, or a rejected later one,
    which lies outside the window as long as at most L - W tokens were rolled back.
    """
    first = start.long()[:, None]
    old = (first - 1) - ((first - 1) - torch.arange(length)) % length
    new = first + torch.arange(tokens)
    key = torch.cat([old, new], 1)[:, None, :]
    query = new[:, :, None]
    return (key >= 0) & (key <= query) & (key > query - window)


def visible_blocks(start: Tensor, tokens: int, blocks: int, ratio: int) -> Tensor:
    """Which compressed entries each query sees: bool [B, S, N]; block b once r(b+1)-1 <= t."""
    closed = (positions(start, tokens) + 1) // ratio
    return torch.arange(blocks) < closed[..., None]
