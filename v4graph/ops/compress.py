"""V4Compress: pool projected key/value rows into one cache entry per block of r tokens.

Source: spec section 2.3; r is the number of rows of `ape`. With overlap a block pools the first
half of the channels of the block before and the second half of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.attention_prep import round_kv
from v4graph.ops.lazy import torch
from v4graph.ops.positional import batch_index, positions, ring_rows, rms_norm, rope
from v4graph.ops.rounding import fake_fp4, hadamard_128
from v4graph.ops.spec import F32, FLOAT, I32, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def _finish(
    pooled: Tensor, norm: Tensor, position: Tensor, freqs: Tensor, quantise: str, eps: float
) -> Tensor:
    """Norm, rotate and round pooled entries [B, C, c] as cache rows of `norm`'s dtype."""
    dtype = norm.dtype
    entry = rms_norm(pooled.to(dtype), norm, eps).to(dtype).float()
    entry = rope(entry, position, freqs).to(dtype)
    if quantise == "kv":
        entry = round_kv(entry.float(), 2 * freqs.shape[0]).to(dtype)
    if quantise == "index":
        entry = fake_fp4(hadamard_128(entry.float()).to(dtype).float()).to(dtype)
    return entry


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    norm: Tensor,
    freqs: Tensor,
    start: Tensor,
    num: Tensor,
    tail_kv: Tensor,
    tail_gate: Tensor,
    cache: Tensor,
    overlap: int,
    quantise: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cache [B, N, c] with every block that the chunk closes, and both tails.

    S tokens close at most C = ceil(S/r) blocks (C <= N). The C rows written are distinct and inside
    the cache; a row whose block is not closed gets its old value back.
    """
    batch, tokens, _ = kv.shape
    length, blocks, width = tail_kv.shape[1], cache.shape[1], cache.shape[2]
    ratio = ape.shape[0]
    first = start.long()[:, None]
    end = first + num.long()[:, None]
    gate = gate + ape[positions(start, tokens) % ratio]
    closing = (tokens + ratio - 1) // ratio
    block = first // ratio
    rows = torch.minimum(block, torch.full_like(block, 1) * (blocks - closing)) + torch.arange(closing)
    live = (rows >= block) & ((rows + 1) * ratio <= end)
    slot = batch_index(batch)
    joined_kv, joined_gate = torch.cat([tail_kv, kv], 1), torch.cat([tail_gate, gate], 1)

    def pooled(back: int, low: int) -> tuple[Tensor, Tensor]:
        """Values and gates [B, C, r, c] of the block `back` before each row, channels from `low`."""
        u = ((rows - back)[..., None] * ratio + torch.arange(ratio)).reshape(batch, closing * ratio)
        source = torch.where(u >= first, length + u - first, u % length).clamp(0, length + tokens - 1)
        known = (u >= 0)[..., None]
        shape = (batch, closing, ratio, width)
        value = torch.where(known, joined_kv[slot, source][..., low : low + width], 0.0)
        score = torch.where(known, joined_gate[slot, source][..., low : low + width], -torch.inf)
        return value.reshape(shape), score.reshape(shape)

    value, score = pooled(0, width if overlap else 0)
    if overlap:
        value_before, score_before = pooled(1, 0)
        value, score = torch.cat([value_before, value], 2), torch.cat([score_before, score], 2)
    entry = _finish((value * score.softmax(2)).sum(2), norm, rows * ratio, freqs, quantise, eps)
    entry = torch.where(live[..., None], entry, cache[slot, rows])
    return (
        cache.index_put((slot.expand_as(rows), rows), entry),
        ring_rows(joined_kv, length, start, num),
        ring_rows(joined_gate, length, start, num),
    )


OP = OpSpec(
    name="V4Compress",
    version=1,
    inputs=(
        Port("kv", F32, "B S CC"),
        Port("gate", F32, "B S CC"),
        Port("ape", F32, "R CC"),
        Port("norm", FLOAT, "C"),
        Port("freqs", F32, "F"),
        Port("start", I32, "B"),
        Port("num", I32, "B"),
        Port("tail_kv", F32, "B L CC"),
        Port("tail_gate", F32, "B L CC"),
        Port("cache", FLOAT, "B N C"),
    ),
    outputs=(
        Port("cache_out", FLOAT, "B N C", alias="cache"),
        Port("tail_kv_out", F32, "B L CC", alias="tail_kv"),
        Port("tail_gate_out", F32, "B L CC", alias="tail_gate"),
    ),
    attributes={"overlap": int, "quantise": str, "eps": float},
    reference=compress,
    tolerance={"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)},
    flips=1e-3,
    structural=("overlap", "quantise"),
)
