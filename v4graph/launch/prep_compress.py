"""Launch plans of the fused preparation: queries, key/value and the compressors.

One launch, unless the chunk is so long that its rows overwrite tails which its own blocks still read; then
the launches of the parts.
"""

from __future__ import annotations

from v4graph.launch import compress, prep
from v4graph.launch.plan import LaunchPlan, Step

_INPUTS = ("q", "kv", "kv_norm", "freqs", "start", "num", "q_out", "kv_out")


def _compressor(p: str, width: str, rows: str) -> tuple[str, ...]:
    names = ("kv", "gate", "ape", "norm", "tail_kv_out", "tail_gate_out", "cache_out")
    return (*(p + name for name in names), width, rows)


def _alone(p: str, width: str, rows: str, overlap: int, quantise: str) -> tuple[Step, ...]:
    """Two launches of a compressor: entries first, then tails."""
    args = (
        *(f"{p}{name}" for name in ("kv", "gate", "ape", "norm")),
        *("freqs", "start", "num"),
        *(f"{p}{name}" for name in ("tail_kv_out", "tail_gate_out", "cache_out")),
    )
    sizes = ("S", width, rows, "R", "L", "N", "F", str(overlap), quantise, "eps")
    return tuple(
        Step(
            "compress.v4_compress",
            grid=(count, "1", "1"),
            block=512,
            args=(*args, first, "closing", *sizes),
            shared=compress.SHARED,
            when="not fused",
        )
        for count, first in (("entries", "entries"), ("T", "0"))
    )


def _plan(op: str, overlap: int, compressors: tuple[tuple[str, str, str, str], ...]) -> LaunchPlan:
    """`compressors`: prefix of the ports, width of entries and of rows, and how entries are quantised."""
    blocks = f"cdiv(rows, 16) + {len(compressors)}*(entries + T)"
    parts = [_compressor(p, width, rows) for p, width, rows, _ in compressors]
    tails = ("T",) if len(compressors) > 1 else ()
    one_launch = Step(
        f"prep.{'v4_csa_prep' if overlap else 'v4_hca_prep'}",
        grid=(blocks, "1", "1"),
        block=512,
        args=(
            *(*_INPUTS, "rows", "H", "Dh"),
            *(name for part in parts for name in part),
            *("entries", "closing", *tails, "S", "R", "L", "N", "F", "eps"),
        ),
        shared=compress.SHARED,
        when="fused",
    )
    queries = Step(
        "prep.v4_attention_prep",
        grid=("cdiv(rows, 4)", "1", "1"),
        block=128,
        args=(*_INPUTS[:5], *_INPUTS[6:], "rows", "S", "H", "Dh", "F", "1", "eps"),
        when="not fused",
    )
    needs = dict(prep.ATTENTION_PREP.needs)
    needs["C % 64 == 0 and C <= 512"] = "entries must be a multiple of 64 wide, up to 512"
    needs[f"CC == C*{1 + overlap}"] = "projected rows must be as wide as entries, twice with overlap"
    if len(compressors) > 1:
        needs["I == 128 and IC == 2*I"] = "index keys must be 128 wide, their projected rows twice that"
    return LaunchPlan(
        op=op,
        lets={
            "T": "B*S",
            **prep.ATTENTION_PREP.lets,
            "closing": "cdiv(S, R)",
            "entries": "B*closing",
            "fused": f"S <= L - R*{1 + overlap} + 1",
        },
        needs=needs,
        steps=(
            one_launch,
            queries,
            *(step for p, width, rows, how in compressors for step in _alone(p, width, rows, overlap, how)),
        ),
    )


HCA = _plan("V4HcaPrep", 0, (("c_", "C", "CC", "1"),))
CSA = _plan("V4CsaPrep", 1, (("c_", "C", "CC", "1"), ("i_", "I", "IC", "2")))
