"""Launch plan of the indexer.

Many tokens: queries are prepared once, scores go through workspace (at most 256 MB of them, or one tile of
tokens, at a time), and a block selects for a token. Few tokens: queries are prepared in the blocks that
score, and blocks share a token's selection; where its entries may be too many to rank, after a histogram and
a list.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_SCORES = 1 << 26
# As in index_select.cu: entries that are ranked as they are; of a list; words of a token's histogram.
_RANKED, _LISTED, _WORDS = 2048, 16384, 8192 + 32
_SELECTION = "1024*8 + 2048*4 + 36*4"
_SIZES = ("S", "N", "ratio")

PLAN = LaunchPlan(
    op="V4IndexTopK",
    lets={
        "T": "B*S",
        # Tokens of a slot that share what a block reads of the keys.
        "share": "min(S, 8)",
        "tiles": "B*cdiv(S, share)",
        "chunk": f"max(1, min(min(tiles, 65535), {_SCORES}//(share*N)))",
        # A block alone takes time in proportion to N; ranking, to the square of at most 2048.
        "long": f"N > {_RANKED}",
        "few": f"T <= where(long, 32, 8) and T*N <= {_SCORES} and Hi <= 128",
        "chunks": "where(few, 0, cdiv(tiles, chunk))",
        "listed_tokens": "where(few and long, T, 0)",
        # Blocks that share the keys of a token, its scores, its ranking.
        "scorers": "min(cdiv(N, 128), max(8, 264//T))",
        "sharers": "min(64, cdiv(N, 4096))",
        "rankers": "max(8, 128//T)",
    },
    workspace={
        "prepared": "T*Hi*C*2",
        "gains": "T*Hi*4",
        "scores": f"4*min(tiles*share*N, max({_SCORES}, share*N))",
        "counts": f"where(long, min(T, 32)*{_WORDS}*4, 0)",
        "listed": f"where(long, min(T, 32)*{_LISTED}*8, 0)",
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
            when="not few",
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
            args=("scores", "start", "rows", *_SIZES, "topk", "share", "i*chunk"),
            shared=_SELECTION,
            repeat="chunks",
            group="chunk",
        ),
        Step(
            "index.v4_index_scores_few",
            grid=("scorers", "T", "1"),
            block=256,
            args=(
                *("q", "weights", "keys", "freqs", "start", "scores", "counts"),
                *("S", "Hi", "N", "F", "ratio", "quantise", f"where(long, {_WORDS}, 0)", "scale"),
            ),
            shared="Hi*(160*2 + 4)",
            when="few",
        ),
        Step(
            "index_select.v4_index_count",
            grid=("sharers", "listed_tokens", "1"),
            block=512,
            args=("scores", "start", "counts", *_SIZES),
            shared="8192*4",
        ),
        Step(
            "index_select.v4_index_collect",
            grid=("sharers", "listed_tokens", "1"),
            block=512,
            args=("scores", "start", "counts", "listed", *_SIZES, "topk"),
            shared="36*4",
        ),
        Step(
            "index_select.v4_index_rank",
            grid=("rankers", "T", "1"),
            block=256,
            args=("scores", "start", "counts", "listed", "rows", *_SIZES, "topk"),
            shared=f"max({_RANKED}*8, {_SELECTION})",
            when="few",
        ),
    ),
)
