"""GPU targets of an engine: what each can hold, which a TensorRT builds for, which run where.

Source: NVIDIA's support matrices, builds of TensorRT for RTX 1.7 for every target, and its words on an H100.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from v4graph.errors import EngineError, near_match

PORTABLE = "portable"
AMPERE = 80


@dataclass(frozen=True)
class Architecture:
    """What NVIDIA calls a target, and the quantised types that its tensor cores read."""

    title: str
    types: frozenset[str] = frozenset()


_FP8 = frozenset({"fp8"})
_FP4 = frozenset({"fp8", "fp4"})
ARCHITECTURES = {
    "sm75": Architecture("Turing (T4, RTX 20)"),
    "sm80": Architecture("Ampere (A100)"),
    "sm86": Architecture("Ampere (A10, RTX 30)"),
    "sm87": Architecture("Ampere (Jetson Orin)"),
    "sm89": Architecture("Ada (L4, L40, RTX 40)", _FP8),
    "sm90": Architecture("Hopper (H100, H200)", _FP8),
    "sm100": Architecture("Blackwell (B200, GB200)", _FP4),
    "sm103": Architecture("Blackwell (B300, GB300)", _FP4),
    "sm110": Architecture("Blackwell (Jetson Thor)", _FP4),
    "sm120": Architecture("Blackwell (RTX 50, RTX PRO 6000)", _FP4),
    "sm121": Architecture("Blackwell (GB10)", _FP4),
}
# What TensorRT for RTX builds for; sm75 is one more, but the library itself crashes there on graphs with
# aliased plugins (docs/design-notes), and bf16 needs Ampere.
RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")


def parse(names: Iterable[str]) -> tuple[str, ...]:
    """Return targets in ascending order without repeats; ("portable",) alone for portable.

    Raises:
        EngineError: an unknown name, or portable together with others.
    """
    chosen = {name.lower().replace("sm_", "sm").replace(".", "") for name in names}
    known = [PORTABLE, *ARCHITECTURES]
    for name in sorted(chosen - set(known)):
        raise EngineError(
            f"--target {name}: no such target{near_match(name, known)}; known are {', '.join(known)}."
        )
    if PORTABLE in chosen and len(chosen) > 1:
        others = ", ".join(sorted(chosen - {PORTABLE}))
        raise EngineError(
            f"--target {PORTABLE} stands alone, but {others} is asked for too; drop one of the two."
        )
    return tuple(sorted(chosen, key=known.index))


def number(target: str) -> int:
    """Return the compute capability of a target: sm89 -> 89."""
    return int(target.removeprefix("sm"))


def runs_on(targets: Iterable[str], gpu: str, *, rtx: bool) -> bool:
    """Return whether a plan for `targets` runs on a GPU ("sm90").

    Full TensorRT's portable plans need Ampere or later; those of TensorRT for RTX run on its own targets and
    what comes after them ("8.0 8.6 8.9 12.0 12.1 >12.0" in its words), not on Hopper or datacentre Blackwell.
    """
    targets = tuple(targets)
    if gpu in targets:
        return True
    newest = number(RTX_TARGETS[-1])
    able = gpu in RTX_TARGETS or number(gpu) > newest if rtx else number(gpu) >= AMPERE
    return PORTABLE in targets and able


def holding(types: Iterable[str], among: Iterable[str]) -> tuple[str, ...]:
    """Return the targets whose tensor cores read all of `types` (of "fp8", "fp4")."""
    needed = frozenset(types)
    return tuple(name for name in among if needed <= ARCHITECTURES[name].types)
