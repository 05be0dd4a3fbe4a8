"""Launch plan of the indexer.

Scores go through workspace: at most 256 MB of them, or one tile of tokens, at a time. A block selects for one
token; where that leaves SMs idle, many rank a token's entries instead, after a histogram has left few of
them.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_SCORES = 1 << 26
# As in index_select.cu: entries that are ranked as they are; of a list; words of a token's histogram.
_RANKED, _LISTED, _WORDS = 2048, 16384, 8192 + 32
_SELECTION = "1024*8 + 2048*4 + 36*4"
_ROWS = ("S", "N", "ratio")

PLAN = LaunchPlan(
    op="V4IndexTopK",
    lets={
        "T": "B*S",
        # Tokens of a slot that share what a block reads of the keys.
        "share": "min(S, 8)",
        "tiles": "B*cdiv(S, share)",
        "chunk": f"max(1, min(min(tiles, 65535), {_SCORES}//(share*N)))",
        "chunks": "cdiv(tiles, chunk)",
        # A block alone takes time in proportion to N; ranking, to the square of at most 2048.
        "long": f"N > {_RANKED}",
        "ranked": "chunks == 1 and T <= where(long, 32, 8)",
        "rows_of_scores": "tiles*share",
        "listed_rows": "where(long and ranked, rows_of_scores, 0)",
        # Blocks that share the scores of a token, or its ranking.
        "sharers": "max(1, min(64, cdiv(N, 4096)))",
        "rankers": "max(8, 128//T)",
    },
    workspace={
        "prepared": "T*Hi*C*2",
        "gains": "T*Hi*4",
        "scores": f"4*min(tiles*share*N, max({_SCORES}, share*N))",
        # Rows of up to 32 tokens in tiles of eight are fewer than 64.
        "counts": f"where(long, min(rows_of_scores, 64)*{_WORDS}*4, 0)",
        "listed": f"where(long, min(rows_of_scores, 64)*{_LISTED}*8, 0)",
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
                *("q", "weights", "freqs", "start", "prepared", "gains", "counts"),
                *("T*Hi", "S", "Hi", "F", "quantise", f"listed_rows*{_WORDS}", "scale"),
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
            "index_select.v4_index_select",
            grid=("min(chunk, tiles - i*chunk)*share", "1", "1"),
            block=512,
            args=("scores", "start", "rows", *_ROWS, "topk", "share", "i*chunk"),
            shared=_SELECTION,
            when="not ranked",
            repeat="chunks",
            group="chunk",
        ),
        Step(
            "index_select.v4_index_count",
            grid=("sharers", "listed_rows", "1"),
            block=512,
            args=("scores", "start", "counts", *_ROWS, "share"),
            shared="8192*4",
        ),
        Step(
            "index_select.v4_index_collect",
            grid=("sharers", "listed_rows", "1"),
            block=512,
            args=("scores", "start", "counts", "listed", *_ROWS, "topk", "share"),
            shared="36*4",
        ),
        Step(
            "index_select.v4_index_rank",
            grid=("rankers", "rows_of_scores", "1"),
            block=256,
            args=("scores", "start", "counts", "listed", "rows", *_ROWS, "topk", "share"),
            shared=f"max({_RANKED}*8, {_SELECTION})",
            when="ranked",
        ),
    ),
)
