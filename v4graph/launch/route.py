"""Launch plans of routing.

V4RouteTopK multiplies all experts, V4RouteHash only those that a token's table row names.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_LOGITS = ("u", "gate", "logits", "T", "D", "E", "span")
_MOST_CHOSEN = "a token must have 1 to 32 experts"

TOPK = LaunchPlan(
    op="V4RouteTopK",
    lets={
        "T": "B*S",
        # Up to 1024 tokens the channels are split over blocks, or too few SMs would be busy.
        "span": "where(T <= 1024, 1024, D)",
        "splits": "cdiv(D, span)",
    },
    workspace={"logits": "4*E*max(T, min(T, 1024)*cdiv(D, 1024))"},
    needs={
        "D % 8 == 0": "D must be a multiple of 8",
        "E <= 512": "there must be at most 512 experts",
        "topk >= 1 and topk <= 32 and topk <= E": f"{_MOST_CHOSEN}, of all there are",
    },
    steps=(
        Step(
            "route.v4_route_logits_8",
            grid=("cdiv(E, 16)", "splits", "1"),
            block=256,
            args=_LOGITS,
            shared="8*16*8*4",
            when="T <= 8",
        ),
        Step(
            "route.v4_route_logits_32",
            grid=("cdiv(E, 16)", "splits", "cdiv(T, 32)"),
            block=256,
            args=_LOGITS,
            shared="8*16*32*4",
            when="T > 8 and T <= 64",
        ),
        Step(
            "route.v4_route_logits_many",
            grid=("cdiv(T, 64)", "splits", "cdiv(E, 128)"),
            block=256,
            args=_LOGITS,
            when="T > 64",
        ),
        Step(
            "route.v4_route_topk",
            grid=("T", "1", "1"),
            block=256,
            args=("logits", "bias", "ids", "weights", "T", "E", "topk", "splits", "scale"),
            shared="512*4 + 512*4 + 32*4",
        ),
    ),
)

HASH = LaunchPlan(
    op="V4RouteHash",
    needs={
        "D % 8 == 0": "D must be a multiple of 8",
        "K >= 1 and K <= 32": _MOST_CHOSEN,
    },
    steps=(
        Step(
            "route.v4_route_hash",
            grid=("B*S", "1", "1"),
            block=512,
            args=("u", "gate", "table", "tokens", "ids", "weights", "V", "D", "E", "K", "scale"),
            shared="16*4*4 + 32*4",
        ),
    ),
)
