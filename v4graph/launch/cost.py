"""Bytes and FLOPs that an op call cannot do without: the floor under its time.

Bytes count every tensor once, as if caches were perfect, and of a cache only the entries that are visible.
Attention is causal: each token of a chunk is charged with what it sees.
FLOPs count a multiplication and an addition as two. Expressions as in launch plans, over the symbols of a
`Call` and `context`, the tokens of each slot before the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from v4graph.launch.calls import Call, parts_of
from v4graph.launch.expression import evaluate
from v4graph.launch.plan import ITEM_BYTES
from v4graph.ops.fused import FUSED_OPS

CSA_RATIO = 4


@dataclass(frozen=True)
class Cost:
    """Expressions of the bytes moved and of the FLOPs; `lets` are evaluated first, in order."""

    bytes: str
    flops: str
    lets: Mapping[str, str]

    def of(self, call: Call, context: int = 0) -> tuple[int, int]:
        """Return (bytes, FLOPs) of one call."""
        symbols: dict[str, int] = {
            # V4SelectedAttention is not told how many tokens a row stands for; others have the attribute.
            "ratio": CSA_RATIO,
            **call.sizes,
            **{name: value for name, value in call.attributes.items() if isinstance(value, int)},
            "context": context,
            "T": call.sizes["B"] * call.sizes["S"],
        }
        for name, text in self.lets.items():
            symbols[name] = evaluate(text, symbols)
        return evaluate(self.bytes, symbols), evaluate(self.flops, symbols)


@dataclass(frozen=True)
class PartsCost:
    """The cost of a fused op: its parts' together, less what they need not write, read, or read again."""

    def of(self, call: Call, context: int = 0) -> tuple[int, int]:
        """Return (bytes, FLOPs) of one call."""
        parts = parts_of(call)
        costs = [COSTS[part.op].of(part, context) for part in parts]
        results = {port.name for port in call.spec.outputs}
        seen: set[str] = set()
        spared = 0
        for part, made in zip(call.spec.parts, parts, strict=True):
            for name, size in zip(part.inputs, _sizes(made), strict=True):
                inner = name not in {port.name for port in call.spec.inputs}
                # A value between parts is neither written nor read; what is read twice is read once.
                spared += size * ((1 if name in results else 2) if inner else name in seen)
                seen.add(name)
        return sum(cost[0] for cost in costs) - spared, sum(cost[1] for cost in costs)


def _sizes(call: Call) -> list[int]:
    """Bytes of each input."""
    return [
        math.prod(shape) * ITEM_BYTES[dtype] for shape, dtype in zip(call.shapes, call.dtypes, strict=True)
    ]


_QO = "4*T*H*Dh"
_NEAR = "B*(min(context, window) + S)*Dh*2"


def _pairs(name: str, ratio: str, most: str) -> dict[str, str]:
    """Lets that end in `name`: min(most, t // ratio) summed over the chunk's tokens t, counted from 1.

    With n = `ratio`*`most` tokens or fewer the sum of t // ratio is ratio*q*(q - 1)/2 + q*(n - q*ratio + 1)
    for q = n // ratio; every token after them adds `most`.
    """
    lets = {f"{name}_full": f"({ratio})*({most})"}
    for end, tokens in (("0", "context"), ("1", "(context + S)")):
        n, q = f"{name}_n{end}", f"{name}_q{end}"
        lets[n] = f"min({tokens}, {name}_full)"
        lets[q] = f"{n}//({ratio})"
        lets[f"{name}_{end}"] = (
            f"({ratio})*{q}*({q} - 1)//2 + {q}*({n} - {q}*({ratio}) + 1) + ({tokens} - {n})*({most})"
        )
    return {**lets, name: f"{name}_1 - {name}_0"}


_NEAR_PAIRS = _pairs("near", "1", "window")

COSTS: Mapping[str, Cost | PartsCost] = {
    "V4HyperPre": Cost("T*(8*D + 2*D + 80) + 24*4*D*4", "T*(2*24*4*D + 8*4*D)", {}),
    "V4HyperPost": Cost("T*(2*D + 16*D + 80)", "T*4*D*10", {}),
    "V4HyperHead": Cost("T*(8*D + 2*D) + 4*4*D*4", "T*(2*4*4*D + 8*4*D)", {}),
    "V4RmsNorm": Cost("T*4*D + 2*D", "T*4*D", {}),
    "V4Linear": Cost("2*O*K + 2*T*(K + O)", "2*T*O*K", {}),
    "V4LinearF32": Cost("2*O*K + T*(2*K + 4*O)", "2*T*O*K", {}),
    "V4Fp8Linear": Cost("O*K + OB*KB + 2*T*(K + O)", "2*T*O*K", {}),
    "V4GroupedOutput": Cost("2*O*K + 2*T*(H*Dh + O)", "2*T*O*K", {}),
    "V4Fp8GroupedOutput": Cost("O*K + OB*KB + 2*T*(H*Dh + O)", "2*T*O*K", {}),
    "V4AttentionPrep": Cost("4*T*(Q + Dh)", "8*T*(Q + Dh)", {}),
    "V4Compress": Cost(
        # The chunk's rows; the blocks' rows that lie in the tails; the tails' new rows; the new entries.
        "T*8*CC + B*blocks*R*8*CC + B*min(S, L)*8*CC + B*blocks*C*2",
        "B*blocks*R*CC*6",
        {"blocks": "(context + S)//R - context//R"},
    ),
    "V4IndexTopK": Cost(
        "B*visible*C*2 + 2*T*(Q + Hi) + 4*T*topk",
        "2*B*pairs*Q",
        {"visible": "min(N, (context + S)//ratio)", **_pairs("pairs", "ratio", "N")},
    ),
    "V4WindowAttention": Cost(f"{_QO} + {_NEAR}", "4*B*near*H*Dh", _NEAR_PAIRS),
    "V4CompressedAttention": Cost(
        f"{_QO} + {_NEAR} + B*far*Dh*2",
        "4*B*(near + pairs)*H*Dh",
        {**_NEAR_PAIRS, "far": "min(N, (context + S)//ratio)", **_pairs("pairs", "ratio", "N")},
    ),
    "V4SelectedAttention": Cost(
        f"{_QO} + {_NEAR} + B*min(S*far, N)*Dh*2",
        "4*B*(near + pairs)*H*Dh",
        {**_NEAR_PAIRS, "far": "min(K, N, (context + S)//ratio)", **_pairs("pairs", "ratio", "min(K, N)")},
    ),
    "V4RouteTopK": Cost("2*E*D + 2*T*D + 8*T*topk", "2*T*E*D", {}),
    "V4RouteHash": Cost("2*min(E, T*K)*D + 2*T*D + 16*T*K", "2*T*K*D", {}),
    "V4MoE": Cost("hit*3*(I*D//2 + I*D//32) + 3*Is*D + 4*T*D", "6*T*D*(K*I + Is)", {"hit": "min(E, T*K)"}),
    "V4MoEFp8": Cost("hit*3*I*D + 3*Is*D + 4*T*D", "6*T*D*(K*I + Is)", {"hit": "min(E, T*K)"}),
    "V4MoEFloat": Cost("hit*6*I*D + 6*Is*D + 4*T*D", "6*T*D*(K*I + Is)", {"hit": "min(E, T*K)"}),
    **{spec.name: PartsCost() for spec in FUSED_OPS},
}
