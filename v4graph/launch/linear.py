"""Launch plans of the linear projections.

Up to 8 or 32 tokens a block reads 16 rows of the weight straight to registers; more tokens go in tiles of 64.
FP8 weights take activations rounded to FP8 and reordered: in the multiplying block, where they fit its shared
memory, or by a launch of their own.
"""

from __future__ import annotations

from v4graph.launch.plan import LaunchPlan, Step

# Shared memory that prepared activations may take, beside the sums.
MOST_PREPARED = 64 << 10
# Two stages of 64 rows of 128 values, and of the codes of 256 weight rows where those are quantised.
TILE = f"2*{64 * 128 * 2}"
CODES_TILE = f"2*{64 * 128 * 2 + 256 * 128}"
WIDTH = {"K % 128 == 0": "the input width must be a multiple of 128"}


def split(rows: str) -> str:
    """Warps (of a block's eight) that share the columns of 16 of `rows` weight rows.

    As few as leave 2,048 warps to the whole product, which is 16 for each multiprocessor of a large GPU;
    those that remain take other rows and use the same prepared activations. No more than there are blocks
    of 128 columns.
    """
    by_rows = f"where({rows} >= 32768, 1, where({rows} >= 16384, 2, where({rows} >= 8192, 4, 8)))"
    return f"min({by_rows}, where(K >= 1024, 8, where(K >= 512, 4, where(K >= 256, 2, 1))))"


def steps(
    unit: str, args: tuple[str, ...], x: str = "x", when: str = "1", rows: str = "O//groups"
) -> tuple[Step, ...]:
    """Steps of one product for 8, 32 and more tokens; `rows`: the weight's rows in a group."""
    tile = CODES_TILE if unit.startswith("fp8") else TILE

    def step(tokens: str, grid: str, shared: str, condition: str) -> Step:
        return Step(
            f"linear.v4_{unit}_{tokens}",
            grid=(grid, "groups", "1"),
            block=256,
            args=(x, *args),
            shared=shared,
            when=f"{condition} and {when}",
        )

    return (
        step("8", f"cdiv({rows}, 16)", "8*8*16*4", "T <= 8"),
        step("32", f"cdiv({rows}, 16)", "8*32*16*4", "T > 8 and T <= 32"),
        step("many", f"cdiv(T, 64)*cdiv({rows}, 256)", tile, "T > 32"),
    )


_FLOAT_ARGS = ("weight", "y", "T", "O", "K", "groups")
_LETS = {"T": "B*S", "groups": "1"}
_GROUPED_ROWS = {"O % groups == 0": "the output rows must divide into the groups"}

LINEAR = LaunchPlan(op="V4Linear", lets=_LETS, needs=WIDTH, steps=steps("linear", _FLOAT_ARGS))
LINEAR_F32 = LaunchPlan(op="V4LinearF32", lets=_LETS, needs=WIDTH, steps=steps("linear_f32", _FLOAT_ARGS))
GROUPED = LaunchPlan(
    op="V4GroupedOutput",
    lets={"T": "B*S"},
    needs={**WIDTH, **_GROUPED_ROWS},
    steps=steps("linear", ("weight", "z", "T", "O", "K", "groups"), "o"),
)


def _fp8(
    op: str, kernel: str, prepare: str, ports: tuple[str, str], lets: dict[str, str], needs: dict[str, str]
) -> LaunchPlan:
    """`prepare`: how activations are prepared, round or order; `ports`: activations and result."""
    x, y = ports
    args = ("weight", "scale", y, "T", "O", "K", "scale_bytes", "groups")
    return LaunchPlan(
        op=op,
        lets={
            "T": "B*S",
            **lets,
            "row": "2*T*(K + 32)",
            "inside": f"T <= 8 and row <= {MOST_PREPARED}",
            "split": split("O"),
        },
        workspace={"prepared": "T*K*groups*2"},
        needs={**WIDTH, **needs},
        steps=(
            Step(
                f"linear.v4_{kernel}_inside",
                grid=("cdiv(O//groups, 128//split)", "groups", "1"),
                block=256,
                args=(x, *args, "split"),
                shared="row + 8*8*16*4",
                when="inside",
            ),
            Step(
                f"linear.v4_{prepare}_rows",
                grid=("cdiv(T*K*groups, 2048)", "1", "1"),
                block=256,
                args=(x, "prepared", "T*K*groups//8"),
                when="not inside",
            ),
            *steps(kernel, args, "prepared", "not inside"),
        ),
    )


FP8_LINEAR = _fp8("V4Fp8Linear", "fp8_linear", "round", ("x", "y"), {"groups": "1"}, {})
FP8_GROUPED = _fp8(
    "V4Fp8GroupedOutput",
    "fp8_grouped",
    "order",
    ("o", "z"),
    {},
    {"O % (16*groups) == 0": "the output rows of a group must be a multiple of 16"},
)
