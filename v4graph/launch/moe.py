"""Launch plans of the MoE ops: group the (token, expert) pairs, up, down, combine.

A tile is up to `tile` rows of one expert, whose matrices are read once for it. How many tiles there are
is known on the device only, so grids cover the most there can be and empty tiles end at once. The shared
expert is one more expert with all tokens for rows. An only token needs no groups: up and down are all.
"""

from __future__ import annotations

from v4graph.launch.linear import CODES_TILE
from v4graph.launch.plan import LaunchPlan, Step

_FORMS = {"V4MoE": "fp4", "V4MoEFp8": "fp8", "V4MoEFloat": "float"}

_LETS = {
    "T": "B*S",
    "pairs": "T*K",
    # An only token takes two launches if what they read of it fits in shared memory.
    "alone": "T == 1 and row*max(D, Is + K*I) <= 96000",
    "tile": "where(alone, 1, where(pairs <= 4*E, 8, where(pairs <= 16*E or T <= 32, 32, 64)))",
    "listed": "where(alone, pairs, min(E, pairs) + pairs//tile)",
    "every": "cdiv(T, tile) + listed",
}


def _plan(op: str) -> LaunchPlan:
    form = _FORMS[op]
    # Bytes of a value between two launches: the float form keeps two bf16, or a float32.
    value = 4 if form == "float" else 2
    return LaunchPlan(
        op=op,
        lets={"row": str(value), **_LETS, "blocks": "0" if form == "float" else "T*D//128"},
        workspace={
            "place": "4*T*K",
            "token_of": "4*T*K",
            "gain_of": "4*T*K",
            "tiles": "16*(E + T*K)",
            "rounded": "0" if form == "float" else "2*T*D",
            "inner": f"{value}*T*(Is + K*I)",
            "routed": f"{value}*T*K*D",
            "shared": f"{value}*T*D",
        },
        needs={
            "D % 128 == 0 and I % 128 == 0 and Is % 128 == 0": "widths must be multiples of 128",
            "I <= 4096 and Is <= 4096": "inner widths must be at most 4096",
            "E <= 512": "there must be at most 512 experts",
            "K <= 32": "a token must have at most 32 experts",
        },
        steps=(*_one(form), _prepare(), *_few(form), *_tiles(form), _combine(form)),
    )


def _prepare() -> Step:
    return Step(
        "moe_group.v4_moe_prepare",
        grid=("1 + cdiv(blocks, 64)", "1", "1"),
        block=1024,
        args=(
            *("ids", "weights", "place", "token_of", "gain_of", "tiles", "pairs", "K", "E", "tile", "listed"),
            *("u", "rounded", "blocks"),
        ),
        shared="32*E*4 + 256",
        when="tile > 1",
    )


def _matrices(form: str, *names: str) -> tuple[str, ...]:
    """Arguments of matrices: each with its scales, then the bytes of a scale."""
    if form == "float":
        return (*(name for name in names for _ in range(2)), "0")
    scale_bytes = "1" if f"{form}{names[0][0]}" == "fp4w" else f"{names[0]}_scale_bytes"
    return (*(argument for name in names for argument in (name, f"{name}_scale")), scale_bytes)


def _up(form: str) -> tuple[str, ...]:
    tokens = "u" if form == "float" else "rounded"
    matrices = (*_matrices(form, "w1", "w3"), *_matrices(form, "s1", "s3"))
    return (tokens, "token_of", "gain_of", "tiles", *matrices, "inner", "T", "D", "I", "Is", "limit")


def _down_matrices(form: str) -> tuple[str, ...]:
    return (*_matrices(form, "w2"), *_matrices(form, "s2"))


def _down(form: str) -> tuple[str, ...]:
    return ("inner", "tiles", *_down_matrices(form))


def _one(form: str) -> tuple[Step, ...]:
    """Where there is one token."""
    matrices = (*_matrices(form, "w1", "w3"), *_matrices(form, "s1", "s3"))
    return (
        Step(
            f"moe_one.v4_moe_{form}_up_1",
            grid=("max(I, Is)//16", "1 + K", "1"),
            block=128,
            args=("ids", "weights", "u", *matrices, "inner", "K", "E", "D", "I", "Is", "limit"),
            shared="2*D + 4*2*16*4",
            when="tile == 1",
        ),
        Step(
            f"moe_one.v4_moe_{form}_down_1",
            grid=("D//32", "1", "1"),
            block=512,
            args=("ids", "inner", *_down_matrices(form), "y", "K", "E", "D", "I", "Is"),
            shared="(K + 2)*128 + row*(Is + K*I)",
            when="tile == 1",
        ),
    )


def _few(form: str) -> tuple[Step, ...]:
    """Where experts have few rows."""
    up = [
        Step(
            f"moe.v4_moe_{form}_up_{rows}",
            grid=("max(I, Is)//16", "every", "1"),
            block=128,
            args=_up(form),
            shared=f"4*2*{rows}*16*4",
            when=f"tile == {rows}",
        )
        for rows in (8, 32)
    ]
    rounded = Step(
        "moe_group.v4_moe_round",
        grid=("cdiv(T*(Is + K*I)//128, 16)", "1", "1"),
        block=256,
        args=("inner", "T*(Is + K*I)//128"),
        when="tile == 32",
    )
    down = [
        Step(
            f"moe.v4_moe_{form}_down_{rows}",
            grid=("D//128", "every", "1"),
            block=256,
            args=(*_down(form), "routed", "shared", "T", "D", "I", "Is"),
            shared="8*(max(I, Is) + 32)*2" if form != "float" and rows == 8 else "0",
            when=f"tile == {rows}",
        )
        for rows in (8, 32)
    ]
    return (*up, *(() if form == "float" else (rounded,)), *down)


def _tiles(form: str) -> tuple[Step, ...]:
    """Where experts have many rows."""
    # Rows of the float form are staged with padding in the end.
    shared = "64*132*4" if form == "float" else CODES_TILE
    return (
        Step(
            f"moe_tiles.v4_moe_{form}_up_64",
            grid=("max(I, Is)//128", "every", "1"),
            block=256,
            args=_up(form),
            shared=shared,
            when="tile == 64",
        ),
        Step(
            f"moe_tiles.v4_moe_{form}_down_64",
            grid=("cdiv(D, 256)", "every", "1"),
            block=256,
            args=(*_down(form), "routed", "shared", "T", "D", "I", "Is"),
            shared=shared,
            when="tile == 64",
        ),
    )


def _combine(form: str) -> Step:
    return Step(
        f"moe_group.v4_moe_combine{'_float' if form == 'float' else ''}",
        grid=("T", "cdiv(D, 1024)", "1"),
        block=128,
        args=("routed", "shared", "place", "y", "K", "D"),
        shared="128",
        when="tile > 1",
    )


FP4 = _plan("V4MoE")
FP8 = _plan("V4MoEFp8")
FLOAT = _plan("V4MoEFloat")
