"""Launch plans of the hyper-connection ops."""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_WIDTH = {"D % 8 == 0": "D must be a multiple of 8"}
_SLICES = {"T": "B*S", "slices": "cdiv(4*D, 256)"}
# Sums, weights and scratch, then one row of D bf16.
_SHARED = "512 + 2*D"


def _mixes(rows: int) -> Step:
    return Step(
        f"hyper.v4_hyper_mixes_{rows}",
        grid=("cdiv(T, 8)", "slices", "1"),
        block=128,
        args=("x", "fn", "partial", "T", "4*D"),
    )


def _pre(x: str, y: str, post: str, comb: str) -> Step:
    return Step(
        "hyper.v4_hyper_pre",
        grid=("T", "1", "1"),
        block=256,
        args=(
            *(x, "partial", "base", "scale", "norm", y, post, comb),
            *("T", "D", "slices", "iters", "eps", "hc_eps"),
        ),
        shared=_SHARED,
    )


PRE = LaunchPlan(
    op="V4HyperPre",
    lets=_SLICES,
    workspace={"partial": "slices*T*25*4"},
    needs=_WIDTH,
    steps=(_mixes(24), _pre("x", "y", "post", "comb")),
)

HEAD = LaunchPlan(
    op="V4HyperHead",
    lets=_SLICES,
    workspace={"partial": "slices*T*5*4"},
    needs=_WIDTH,
    steps=(
        _mixes(4),
        Step(
            "hyper.v4_hyper_head",
            grid=("T", "1", "1"),
            block=256,
            args=("x", "partial", "base", "scale", "norm", "y", "T", "D", "slices", "eps", "hc_eps"),
            shared=_SHARED,
        ),
    ),
)

POST = LaunchPlan(
    op="V4HyperPost",
    needs=_WIDTH,
    steps=(
        Step(
            "hyper.v4_hyper_post",
            grid=("B*S", "cdiv(D, 1024)", "1"),
            block=128,
            args=("y", "x", "post", "comb", "z", "D"),
        ),
    ),
)

# Slices of 256 columns for 8 tokens as in `_mixes`.
POST_PRE = LaunchPlan(
    op="V4HyperPostPre",
    lets=_SLICES,
    workspace={"partial": "slices*T*25*4"},
    needs=_WIDTH,
    steps=(
        Step(
            "hyper.v4_hyper_post_mixes",
            grid=("cdiv(T, 8)", "slices", "1"),
            block=128,
            args=("y", "x", "post", "comb", "z", "fn", "partial", "T", "D"),
            shared="8*256*2",
        ),
        _pre("z", "h", "next_post", "next_comb"),
    ),
)
