"""Launch plans of the MoE ops: group the (token, expert) pairs, up, down, combine.

A tile is up to `tile` rows of one expert; its matrices are read once. How many tiles there are is known on the
device only, so grids cover the most there can be and empty tiles end at once.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

_COMMON = {
    "T": "B*S",
    "pairs": "T*K",
    # Rows of a tile: 1, 8 or 32 for matrices that are read for few rows each, else 64.
    "tile": "where(T == 1, 1, where(pairs <= 4*E, 8, 32))",
    "bound": "min(E, pairs) + pairs//tile",
    "listed": "cdiv(T, tile) + bound",
}


def _plan(op: str, form: str) -> LaunchPlan:
    quantised = form != "float"
    kernel = f"moe.v4_moe_{form}"
    scales = (lambda port: f"{port}_scale") if quantised else (lambda port: port)
    sizes = {"fp4": ("1", "s1_scale_bytes"), "fp8": ("w1_scale_bytes", "s1_scale_bytes"), "float": ("0", "0")}[form]
    grouping = ("ids", "weights", "place", "token_of", "gain_of", "tiles", "pairs", "K", "E", "tile", "bound")
    up = (
        *("rounded" if quantised else "u", "token_of", "gain_of", "tiles"),
        *("w1", scales("w1"), "w3", scales("w3"), sizes[0], "s1", scales("s1"), "s3", scales("s3"), sizes[1]),
        *("inner", "always", "T", "D", "I", "Is", "limit"),
    )
    down = (
        *("inner", "always", "tiles", "w2", scales("w2"), sizes[0], "s2", scales("s2"), sizes[1]),
        *("routed", "shared", "T", "D", "I", "Is"),
    )
    few = [
        step
        for rows in (1, 8, 32)
        for step in (
            Step(
                f"{kernel}_up_{rows}",
                grid=("max(I, Is)//16", "listed", "1"),
                block=128,
                args=up,
                shared=f"4*2*{max(rows, 8)}*16*4",
                when=f"tile == {rows}",
            ),
            *_rounds(f"tile == {rows}" if quantised and rows == 32 else "0"),
            Step(
                f"{kernel}_down_{rows}",
                grid=("cdiv(D, 128)", "listed", "1"),
                block=256,
                args=down,
                shared=f"{rows}*(max(I, Is) + 32)*2" if quantised and rows < 32 else "0",
                when=f"tile == {rows}",
            ),
        )
    ]
    return LaunchPlan(
        op=op,
        lets={**_COMMON, "blocks": "T*D//128" if quantised else "0"},
        workspace={
            "place": "4*T*K",
            "token_of": "4*T*K",
            "gain_of": "4*T*K",
            "tiles": "16*(E + T*K)",
            "rounded": "2*T*D" if quantised else "0",
            "inner": f"{2 if quantised else 4}*T*K*I",
            "always": f"{2 if quantised else 4}*T*Is",
            "routed": f"{2 if quantised else 4}*T*K*D",
            "shared": f"{2 if quantised else 4}*T*D",
        },
        needs={
            "D % 128 == 0 and I % 128 == 0 and Is % 128 == 0": "widths must be multiples of 128",
            "E <= 512": "there must be at most 512 experts",
            "K <= 32": "a token must have at most 32 experts",
        },
        steps=(
            Step(
                "moe_group.v4_moe_prepare",
                grid=("1 + cdiv(blocks, 32)", "1", "1"),
                block=1024,
                args=(*grouping, "u", "rounded", "blocks"),
                shared="32*E*4 + 256",
            ),
            *few,
            Step(
                f"moe_group.v4_moe_combine{'' if quantised else '_float'}",
                grid=("T", "cdiv(D, 1024)", "1"),
                block=128,
                args=("routed", "shared", "place", "y", "K", "D"),
                shared="128",
            ),
        ),
    )


def _rounds(when: str) -> tuple[Step, ...]:
    """Round the inner products to FP8 in place."""
    return tuple(
        Step(
            "moe_group.v4_moe_round",
            grid=(f"cdiv({rows}*{width}//128, 8)", "1", "1"),
            block=256,
            args=(buffer, f"{rows}*{width}//128"),
            when=when,
        )
        for buffer, rows, width in (("inner", "pairs", "I"), ("always", "T", "Is"))
    )


FP4 = _plan("V4MoE", "fp4")
FP8 = _plan("V4MoEFp8", "fp8")
FLOAT = _plan("V4MoEFloat", "float")
