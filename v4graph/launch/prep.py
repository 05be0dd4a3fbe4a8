"""Launch plans of the norms and of the queries' and keys' preparation."""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

RMS_NORM = LaunchPlan(
    op="V4RmsNorm",
    needs={"D % 8 == 0": "D must be a multiple of 8"},
    steps=(
        Step(
            "norm.v4_rms_norm",
            grid=("B*S", "1", "1"),
            block=128,
            args=("x", "weight", "y", "D", "eps"),
            shared="128",
        ),
    ),
)

ATTENTION_PREP = LaunchPlan(
    op="V4AttentionPrep",
    lets={"H": "Q//Dh", "rows": "B*S*(H + 1)"},
    needs={
        "Dh % 64 == 0 and Dh <= 512": "head_dim must be a multiple of 64 up to 512",
        "F % 32 == 0 and 2*F <= Dh": "the rotated channels must be a multiple of 64",
    },
    steps=(
        Step(
            "prep.v4_attention_prep",
            grid=("cdiv(rows, 4)", "1", "1"),
            block=128,
            args=(
                *("q", "kv", "kv_norm", "freqs", "start", "q_out", "kv_out"),
                *("rows", "S", "H", "Dh", "F", "quantise", "eps"),
            ),
        ),
    ),
)
