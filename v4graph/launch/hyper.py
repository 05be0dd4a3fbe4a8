"""Launch plans of the hyper-connection ops."""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

POST = LaunchPlan(
    op="V4HyperPost",
    needs={"D % 8 == 0": "D must be a multiple of 8"},
    steps=(
        Step(
            "hyper.v4_hyper_post",
            grid=("cdiv(D, 1024)", "B*S", "1"),
            block=128,
            args=("y", "x", "post", "comb", "z", "D"),
        ),
    ),
)
