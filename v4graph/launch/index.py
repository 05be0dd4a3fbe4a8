"""Launch plan of the indexer.

Scores go through workspace: at most 256 MB of them, or one tile of tokens, at a time.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_SCORES = 1 << 26

PLAN = LaunchPlan(
    op="V4IndexTopK",
    lets={
        "T": "B*S",
        # Tokens of a slot that share what a block reads of the keys.
        "share": "min(S, 8)",
        "tiles": "B*cdiv(S, share)",
        "chunk": f"max(1, min(min(tiles, 65535), {_SCORES}//(share*N)))",
        "chunks": "cdiv(tiles, chunk)",
    },
    workspace={
        "prepared": "T*Hi*C*2",
        "gains": "T*Hi*4",
        "scores": f"4*min(tiles*share*N, max({_SCORES}, share*N))",
    },
    needs={
        "C == 128": "index keys must be 128 wide",
        "F % 2 == 0 and 2*F <= C": "the rotated channels must be a multiple of four",
        "topk <= 1024": "at most 1024 entries can be selected",
    },
    steps=(
        Step(
            "index.v4_index_prepare",
            grid=("cdiv(T*Hi, 4)", "1", "1"),
            block=128,
            args=(
                *("q", "weights", "freqs", "start", "prepared", "gains"),
                *("T*Hi", "S", "Hi", "F", "quantise", "scale"),
            ),
        ),
        Step(
            "index.v4_index_scores",
            grid=("cdiv(N, 128)", "min(chunk, tiles - i*chunk)", "1"),
            block=128,
            args=(
                *("prepared", "gains", "keys", "start", "scores"),
                *("S", "Hi", "N", "ratio", "share", "i*chunk"),
            ),
            repeat="chunks",
            group="chunk",
        ),
        Step(
            "index.v4_index_select",
            grid=("min(chunk, tiles - i*chunk)*share", "1", "1"),
            block=512,
            args=("scores", "start", "rows", "S", "N", "ratio", "topk", "share", "i*chunk"),
            shared="2048*4 + 1024*8 + 36*4",
            repeat="chunks",
            group="chunk",
        ),
    ),
)
