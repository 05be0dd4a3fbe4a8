"""V4WindowAttention, V4CompressedAttention, V4SelectedAttention: the hybrid attention.

One shared key/value head; candidates are the sliding window and, by layer kind, every visible
compressed entry (HCA) or the indexer's selection (CSA). The window ring is updated in the same op.
Source: spec sections 2.2, 2.4, 2.5, 2.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.attend import shared_scores, shared_values, sink_softmax
from v4graph.ops.lazy import torch
from v4graph.ops.positional import batch_index, positions, ring_rows, rope, visible_blocks, window_visibility
from v4graph.ops.spec import F32, FLOAT, I32, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def _rotate_back(o: Tensor, dtype: torch.dtype, freqs: Tensor, start: Tensor) -> Tensor:
    """Undo the rotation that the values carry, so each depends on relative distance only."""
    return rope(o.to(dtype).float(), positions(start, o.shape[1]), freqs, inverse=True).to(dtype)


def window_attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    freqs: Tensor,
    start: Tensor,
    num: Tensor,
    ring: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o [B, S, H, Dh] and the next ring [B, L, Dh]; the window alone is attended."""
    length = ring.shape[1]
    joined = torch.cat([ring, kv], 1)
    visible = window_visibility(start, length, kv.shape[1], window)
    p, total = sink_softmax(shared_scores(q, joined, visible, scale), sink)
    o = shared_values(p.to(q.dtype).float(), joined) / total
    return _rotate_back(o, q.dtype, freqs, start), ring_rows(joined, length, start, num)


def compressed_attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    freqs: Tensor,
    start: Tensor,
    num: Tensor,
    ring: Tensor,
    cache: Tensor,
    window: int,
    ratio: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o [B, S, H, Dh] and the next ring; window and every visible entry of `cache` [B, N, Dh]."""
    length, tokens = ring.shape[1], kv.shape[1]
    joined = torch.cat([ring, kv], 1)
    keys = torch.cat([joined, cache], 1)
    visible = torch.cat(
        [
            window_visibility(start, length, tokens, window),
            visible_blocks(start, tokens, cache.shape[1], ratio),
        ],
        -1,
    )
    p, total = sink_softmax(shared_scores(q, keys, visible, scale), sink)
    o = shared_values(p.to(q.dtype).float(), keys) / total
    return _rotate_back(o, q.dtype, freqs, start), ring_rows(joined, length, start, num)


def selected_attention(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    freqs: Tensor,
    start: Tensor,
    num: Tensor,
    ring: Tensor,
    cache: Tensor,
    rows: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return o [B, S, H, Dh] and the next ring; window and the entries `rows` [B, S, K] (-1: none)."""
    batch, tokens, _, width = q.shape
    length, count = ring.shape[1], rows.shape[2]
    joined = torch.cat([ring, kv], 1)
    near = shared_scores(q, joined, window_visibility(start, length, tokens, window), scale)
    index = rows.long()
    flat = index.clamp(min=0).reshape(batch, tokens * count)
    chosen = cache[batch_index(batch), flat].reshape(batch, tokens, count, width).float()
    far = (q.float() @ chosen.transpose(2, 3)) * scale
    far = torch.where((index >= 0)[:, :, None], far, -torch.inf)
    p, total = sink_softmax(torch.cat([near, far], -1), sink)
    p = p.to(q.dtype).float()
    split = length + tokens
    o = (shared_values(p[..., :split], joined) + p[..., split:] @ chosen) / total
    return _rotate_back(o, q.dtype, freqs, start), ring_rows(joined, length, start, num)


_INPUTS = (
    Port("q", FLOAT, "B S H Dh"),
    Port("kv", FLOAT, "B S Dh"),
    Port("sink", F32, "H"),
    Port("freqs", F32, "F"),
    Port("start", I32, "B"),
    Port("num", I32, "B"),
    Port("ring", FLOAT, "B L Dh"),
)
_OUTPUTS = (Port("o", FLOAT, "B S H Dh"), Port("ring_out", FLOAT, "B L Dh", alias="ring"))
_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)}

WINDOW_OP = OpSpec(
    name="V4WindowAttention",
    version=1,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes={"window": int, "scale": float},
    reference=window_attention,
    tolerance=_TOLERANCE,
)

COMPRESSED_OP = OpSpec(
    name="V4CompressedAttention",
    version=1,
    inputs=(*_INPUTS, Port("cache", FLOAT, "B N Dh")),
    outputs=_OUTPUTS,
    attributes={"window": int, "ratio": int, "scale": float},
    reference=compressed_attention,
    tolerance=_TOLERANCE,
)

SELECTED_OP = OpSpec(
    name="V4SelectedAttention",
    version=1,
    inputs=(*_INPUTS, Port("cache", FLOAT, "B N Dh"), Port("rows", I32, "B S K")),
    outputs=_OUTPUTS,
    attributes={"window": int, "scale": float},
    reference=selected_attention,
    tolerance=_TOLERANCE,
)
