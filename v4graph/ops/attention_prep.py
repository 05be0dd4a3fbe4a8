"""V4AttentionPrep: norm and rotate the queries; norm, rotate and FP8-round the shared key/value.

Source: spec section 2.2. Each rounding to the graph's dtype is where the official code has one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch
from v4graph.ops.positional import positions, rms_norm, rope
from v4graph.ops.rounding import fake_fp8
from v4graph.ops.spec import F32, FLOAT, I32, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor

KV_BLOCK = 64


def round_kv(kv: Tensor, rotated: int) -> Tensor:
    """Round all but the last `rotated` channels of float32 [..., D] to FP8 in blocks of 64."""
    plain = kv.shape[-1] - rotated
    return torch.cat([fake_fp8(kv[..., :plain], KV_BLOCK), kv[..., plain:]], -1)


def attention_prep(
    q: Tensor, kv: Tensor, kv_norm: Tensor, freqs: Tensor, start: Tensor, quantise: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Return q [B, S, H, Dh] and kv [B, S, Dh] for positions start, start+1, ...; q comes as [B, S, H*Dh]."""
    batch, tokens, width = kv.shape
    position = positions(start, tokens)
    heads = q.reshape(batch, tokens, q.shape[-1] // width, width)
    heads = rms_norm(heads, None, eps).to(q.dtype).float()
    entry = rms_norm(kv, kv_norm, eps).to(kv.dtype).float()
    entry = rope(entry, position, freqs).to(kv.dtype)
    if quantise:
        entry = round_kv(entry.float(), 2 * freqs.shape[0]).to(kv.dtype)
    return rope(heads, position, freqs).to(q.dtype), entry


OP = OpSpec(
    name="V4AttentionPrep",
    version=1,
    inputs=(
        Port("q", FLOAT, "B S Q"),
        Port("kv", FLOAT, "B S Dh"),
        Port("kv_norm", FLOAT, "Dh"),
        Port("freqs", F32, "F"),
        Port("start", I32, "B"),
    ),
    outputs=(Port("q_out", FLOAT, "B S Q//Dh Dh"), Port("kv_out", FLOAT, "B S Dh")),
    attributes={"quantise": int, "eps": float},
    reference=attention_prep,
    tolerance={"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)},
    flips=1e-3,
    structural=("quantise",),
)
