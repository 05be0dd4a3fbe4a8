"""Launch plans of the three attentions.

Many tokens with many heads: a block attends 64 heads of up to four tokens, one after the other. Else it
attends one token with 16 or 32 heads. Where that leaves SMs idle, the keys are split over more blocks, and a
second kernel adds their sums up.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

# Streaming multiprocessors that a plan counts with: an H200's, so that every GPU gives the same bits.
_SMS = 132
_NEAR = ("q", "kv", "sink", "freqs", "start", "num", "ring")


def _plan(op: str, kernel: str, far: tuple[str, ...], most: str, numbers: tuple[str, str, str]) -> LaunchPlan:
    """`most`: expression of the most keys of a query; `numbers`: those of N, K and ratio."""
    rows, chosen, ratio = numbers

    def attend(heads: int, when: str) -> Step:
        return Step(
            f"attention.v4_{kernel}_attention_{heads}",
            grid=("T*head_tiles", "splits", "1"),
            block=256,
            args=(
                *_NEAR,
                *far,
                *("o", "ring_out", "partial", "S", "H", "L", rows, chosen, "window", ratio, "fused", "scale"),
            ),
            shared=f"2*32*512*2 + 8*{heads}*32*4 + {heads}*32*2 + {heads}*4 + 4*32*4 + 32*8",
            when=when,
        )

    wide = Step(
        f"attention_wide.v4_{kernel}_attention_64",
        grid=("cdiv(T, run)*wide_tiles", "1", "1"),
        block=256,
        args=(
            *_NEAR,
            *far,
            *("o", "ring_out", "S", "H", "L", rows, chosen, "window", ratio, "fused", "T", "run", "scale"),
        ),
        shared="2*32*512*2 + 2*8*3*32*16 + 64*32*2 + 3*64*4 + 4*32*8 + 256*8 + 8*32*8"
        " + 4*4 + 8*4 + 4*6*4 + 3*4",
        when="wide",
    )

    return LaunchPlan(
        op=op,
        lets={
            "T": "B*S",
            "wide_tiles": "cdiv(H, 64)",
            "wide": f"H > 32 and T*wide_tiles >= {_SMS}*3//4",
            # At most 4 tokens a block, in full waves: runs hide the queries' way from memory.
            "waves": f"cdiv(T*wide_tiles, {_SMS}*4)",
            "run": f"cdiv(T*wide_tiles, {_SMS}*waves)",
            # Few heads a block where even the shortest splits leave SMs idle.
            "heads": f"where(H <= 16 or T*cdiv(H, 32)*cdiv({most}, 32) <= {_SMS}//2, 16, 32)",
            "head_tiles": "cdiv(H, heads)",
            "blocks": "T*head_tiles",
            "splits": f"where(wide or blocks >= {_SMS}, 1, min(cdiv({_SMS}, blocks), cdiv({most}, 32)))",
            # Then no query sees a row of the ring that the chunk overwrites.
            "fused": "S <= L - window",
        },
        # Only fewer than _SMS blocks are split, into fewer than 2 * _SMS.
        workspace={"partial": f"2*{_SMS}*where(H <= 16, 16, 32)*514*4"},
        needs={
            "Dh == 512": "the kernels are for head_dim 512",
            "F == 32": "the kernels are for qk_rope_head_dim 64",
        },
        steps=(
            attend(16, "heads == 16 and not wide"),
            attend(32, "heads == 32 and not wide"),
            wide,
            Step(
                "attention.v4_attention_combine",
                grid=("T*H", "1", "1"),
                block=128,
                args=("partial", "sink", "freqs", "start", "o", "S", "H", "splits"),
                when="splits > 1",
            ),
            Step(
                "attention.v4_ring_update",
                grid=("cdiv(T, 4)", "1", "1"),
                block=256,
                args=("kv", "start", "num", "ring_out", "S", "L", "T"),
                when="not fused",
            ),
        ),
    )


WINDOW = _plan("V4WindowAttention", "window", (), "window", ("0", "0", "1"))
COMPRESSED = _plan("V4CompressedAttention", "compressed", ("cache",), "window + N", ("N", "0", "ratio"))
SELECTED = _plan("V4SelectedAttention", "selected", ("cache", "rows"), "window + K", ("N", "K", "1"))
