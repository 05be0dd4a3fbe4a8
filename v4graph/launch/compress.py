"""Launch plan of the compressor."""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_TENSORS = (
    *("kv", "gate", "ape", "norm", "freqs", "start", "num"),
    *("tail_kv_out", "tail_gate_out", "cache_out"),
)
_SIZES = ("S", "C", "CC", "R", "L", "N", "F", "overlap", "quantise", "eps")

# A pool of 12 floats a thread, and scratch.
SHARED = "512*12*4 + 128"

PLAN = LaunchPlan(
    op="V4Compress",
    choices={"quantise": ("none", "kv", "index")},
    lets={
        "closing": "cdiv(S, R)",
        "entries": "B*closing",
        # Then no block that closes reads a row of the rings that the chunk overwrites.
        "fused": "S <= L - R*(1 + overlap) + 1",
    },
    needs={
        "C % 64 == 0 and C <= 512": "entries must be a multiple of 64 wide, up to 512",
        "CC == C*(1 + overlap)": "projected rows must be as wide as entries, twice with overlap",
        "F % 32 == 0 and 2*F <= C": "the rotated channels must be a multiple of 64",
        "quantise != 2 or C == 128": "index keys must be 128 wide",
    },
    steps=(
        Step(
            "compress.v4_compress",
            grid=("entries + fused*B*S", "1", "1"),
            block=512,
            args=(*_TENSORS, "entries", "closing", *_SIZES),
            shared=SHARED,
        ),
        Step(
            "compress.v4_compress",
            grid=("B*S", "1", "1"),
            block=512,
            args=(*_TENSORS, "0", "closing", *_SIZES),
            shared=SHARED,
            when="not fused",
        ),
    ),
)
