"""Launch plans of the hyper-connection ops."""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_WIDTH = {"D % 8 == 0": "D must be a multiple of 8"}
# The shared memory of the smallest GPU; only a token that is mixed in one block needs it.
_STAGED = {**_WIDTH, "D <= 9904": "a token of more than 9904 channels does not fit a block"}
_SLICES = {"T": "B*S", "slices": "cdiv(4*D, 256)"}
# Sums of eight warps, scratch, then the streams and the norm's weight.
_SHARED = "8*32*8 + 32*4 + 5*D*2"


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
        # With few tokens, post and comb are made beside y.
        grid=("T", "where(T <= 64, 2, 1)", "1"),
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
    needs=_STAGED,
    steps=(_mixes(24), _pre("x", "y", "post", "comb")),
)

HEAD = LaunchPlan(
    op="V4HyperHead",
    lets=_SLICES,
    workspace={"partial": "slices*T*5*4"},
    needs=_STAGED,
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
    needs=_STAGED,
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
