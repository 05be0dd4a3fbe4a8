"""Launch plans of the fused projections.

Up to 8 tokens whose prepared rows fit a block's shared memory take one launch, in which each block multiplies
rows of one of the weights. More tokens are prepared once; up to 32, every weight takes a launch of its own;
beyond, one launch has the tiles of all FP8 weights and another those of all others.
"""

from __future__ import annotations

from v4graph.launch.linear import CODES_TILE, MOST_PREPARED, TILE, WIDTH, split, steps
from v4graph.launch.plan import LaunchPlan, Step

# Weight, result and rows of each product.
Fp8 = tuple[str, str, str]

_PAIR: tuple[Fp8, ...] = (("wq_a", "latent", "Oq"), ("wkv", "kv", "Okv"))
_MAIN = (("compressor_wkv", "compressor_rows", "Oc"), ("compressor_wgate", "compressor_gate", "Oc"))
_INDEX = (("index_wkv", "index_rows", "Oi"), ("index_wgate", "index_gate", "Oi"))


def _plan(
    op: str,
    kernel: str,
    inside: tuple[str, ...],
    fp8: tuple[Fp8, ...],
    plain: tuple[tuple[str, Fp8], ...] = (),
    norm: bool = False,
) -> LaunchPlan:
    """`inside`: arguments of the one launch between x and T; `plain`: unquantised products by unit."""
    scale_bytes = f"{fp8[0][0]}_scale_bytes"
    rows = [one[2] for one in fp8] + [one[2] for _, one in plain]
    x = "normed" if norm else "x"
    one_launch = Step(
        f"project.{kernel}",
        grid=(" + ".join(f"cdiv({count}, 128//split)" for count in rows), "1", "1"),
        block=256,
        args=("x", *inside, "T", "K", scale_bytes, *(("split", "eps") if norm else ())),
        shared="row + 8*8*16*4",
        when="inside",
    )
    norm_first = Step(
        "norm.v4_rms_norm",
        grid=("T", "1", "1"),
        block=128,
        args=("x", "norm", "normed", "K", "eps"),
        shared="128",
        when="not inside",
    )
    prepare = Step(
        "linear.v4_round_rows",
        grid=("cdiv(T*K, 2048)", "1", "1"),
        block=256,
        args=(x, "prepared", "T*K//8"),
        when="not inside",
    )
    products = [
        steps(
            "fp8_linear",
            (w, f"{w}_scale", y, "T", count, "K", scale_bytes, "1"),
            "prepared",
            "not inside",
            count,
        )
        for w, y, count in fp8
    ]
    products += [
        steps(unit, (w, y, "T", count, "K", "1"), "x", "not inside", count) for unit, (w, y, count) in plain
    ]
    few = [step for one in products for step in one[:2]]
    if len(fp8) == 1:
        many = [products[0][2]]
    else:
        many = [_many("pair", ("prepared", *_pair(fp8), "T", "K", scale_bytes), rows[:2], CODES_TILE)]
    if plain:
        arguments = ("x", *inside[len(_pair(fp8)) :], "T", "K")
        many.append(_many(kernel.removeprefix("v4_project_"), arguments, rows[2:], TILE))
    return LaunchPlan(
        op=op,
        lets={
            "T": "B*S",
            "groups": "1",
            # The norm's weight is one row more.
            "row": "2*(T + 1)*(K + 32)" if norm else "2*T*(K + 32)",
            "inside": f"T <= 8 and row <= {MOST_PREPARED}",
            "split": split(f"({' + '.join(rows)})") if norm else "8",
        },
        workspace={**({"normed": "T*K*2"} if norm else {}), "prepared": "T*K*2"},
        needs=WIDTH,
        steps=(one_launch, *((norm_first,) if norm else ()), prepare, *few, *many),
    )


def _many(name: str, arguments: tuple[str, ...], rows: list[str], shared: str) -> Step:
    """Tiles of 64 tokens by 256 rows of several weights."""
    return Step(
        f"project.v4_project_{name}_many",
        grid=(f"cdiv(T, 64)*({' + '.join(f'cdiv({count}, 256)' for count in rows)})", "1", "1"),
        block=256,
        args=arguments,
        shared=shared,
        when="T > 32",
    )


def _pair(products: tuple[Fp8, ...]) -> tuple[str, ...]:
    return tuple(name for w, y, count in products for name in (w, f"{w}_scale", y, count))


def _plain(products: tuple[Fp8, ...]) -> tuple[str, ...]:
    """Weights and results, then the rows that they share."""
    return (*(name for w, y, _ in products for name in (w, y)), products[0][2])


def _f32(products: tuple[Fp8, ...]) -> tuple[tuple[str, Fp8], ...]:
    return tuple(("linear_f32", one) for one in products)


_HEADS = (("weights_proj", "weights", "Ow"),)
_QUERY = (("wq_b", "q", "Oq"),)
_QUERIES = (*_QUERY, ("index_wq_b", "index_q", "Oi"))

WINDOW = _plan("V4WindowProjections", "v4_project_window", _pair(_PAIR), _PAIR)
HCA = _plan("V4HcaProjections", "v4_project_hca", (*_pair(_PAIR), *_plain(_MAIN)), _PAIR, _f32(_MAIN))
CSA = _plan(
    "V4CsaProjections",
    "v4_project_csa",
    (*_pair(_PAIR), *_plain(_MAIN), *_plain(_INDEX), *_plain(_HEADS)),
    _PAIR,
    (*_f32((*_MAIN, *_INDEX)), ("linear", _HEADS[0])),
)
QUERY = _plan("V4QueryProjection", "v4_project_query", ("norm", *_pair(_QUERY)), _QUERY, norm=True)
CSA_QUERY = _plan(
    "V4CsaQueryProjections", "v4_project_csa_query", ("norm", *_pair(_QUERIES)), _QUERIES, norm=True
)
