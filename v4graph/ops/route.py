"""V4RouteTopK and V4RouteHash: choose the experts of each token and their weights.

Source: spec section 3: sqrt(softplus) scores, selection with the bias or by token id, weights
without the bias, normalised and scaled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch
from v4graph.ops.spec import F32, FLOAT, I32, I64, WEIGHT, OpSpec, Port
from v4graph.ops.stable_topk import stable_topk

if TYPE_CHECKING:
    from torch import Tensor


def _scores(u: Tensor, gate: Tensor) -> Tensor:
    functional = torch.nn.functional
    return functional.softplus(functional.linear(u.float(), gate.float())).sqrt()


def _weights(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
    chosen = scores.gather(-1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * scale


def route_topk(u: Tensor, gate: Tensor, bias: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return ids int32 [B, S, K] and weights float32 [B, S, K] for u [B, S, D]."""
    scores = _scores(u, gate)
    _, ids = stable_topk(scores + bias, topk)
    return ids.int(), _weights(scores, ids, scale)


def route_hash(u: Tensor, gate: Tensor, table: Tensor, tokens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return ids and weights; the experts of a token id are a row of `table` [V, K]."""
    ids = table[tokens]
    return ids.int(), _weights(_scores(u, gate), ids, scale)


_TOLERANCE = {"float32": (1e-4, 1e-5), "bfloat16": (1e-4, 1e-5)}

TOPK_OP = OpSpec(
    name="V4RouteTopK",
    version=1,
    inputs=(Port("u", FLOAT, "B S D"), Port("gate", WEIGHT, "E D"), Port("bias", F32, "E")),
    outputs=(Port("ids", I32, "B S topk"), Port("weights", F32, "B S topk")),
    attributes={"topk": int, "scale": float},
    reference=route_topk,
    tolerance=_TOLERANCE,
)

HASH_OP = OpSpec(
    name="V4RouteHash",
    version=1,
    inputs=(
        Port("u", FLOAT, "B S D"),
        Port("gate", WEIGHT, "E D"),
        Port("table", I64, "V K"),
        Port("tokens", I64, "B S"),
    ),
    outputs=(Port("ids", I32, "B S K"), Port("weights", F32, "B S K")),
    attributes={"scale": float},
    reference=route_hash,
    tolerance=_TOLERANCE,
)
