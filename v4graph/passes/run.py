"""Run graph passes in order, and say what each did to the graph and to a decoded token."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from v4graph.errors import PassError, near_match
from v4graph.passes.measure import Step, measure, sum_launches

Pass = ir.passes.PassBase


@dataclass(frozen=True)
class Figures:
    """A graph in numbers: nodes outside bodies, custom ops; launches (None: unknown) and bytes of a step."""

    nodes: int
    custom: int
    launches: int | None
    bytes: int


@dataclass(frozen=True)
class PassReport:
    """What one pass did."""

    name: str
    modified: bool
    seconds: float
    before: Figures
    after: Figures


def name_of(one: Pass) -> str:
    """Return a pass's name: `FuseHcaPrep`, and `RemoveUnusedNodes` for onnx_ir's `RemoveUnusedNodesPass`."""
    shown = repr(one)
    return shown if re.fullmatch(r"\w+", shown) else type(one).__name__.removesuffix("Pass")


def summary_of(one: Pass) -> str:
    """Return what a pass does in one line: its `summary`, or how its docstring or its module's begins."""
    module = sys.modules.get(type(one).__module__)
    text = getattr(one, "summary", "") or type(one).__doc__ or getattr(module, "__doc__", "") or ""
    words = " ".join(text.strip().split("\n\n")[0].split())
    return words or f"onnx_ir's {type(one).__name__}."


def figures(model: ir.Model, step: Step) -> Figures:
    """Return the figures of a graph for one step."""
    blocks = measure(model, step)
    return Figures(
        nodes=sum(len(block.nodes) for block in blocks),
        custom=sum(block.custom for block in blocks),
        launches=sum_launches(block.launches for block in blocks),
        bytes=sum(block.bytes for block in blocks),
    )


def select(passes: Sequence[Pass], only: Iterable[str] = (), skip: Iterable[str] = ()) -> tuple[Pass, ...]:
    """Return the passes named in `only` (all if empty), in pipeline order, without those in `skip`.

    Raises:
        PassError: a name that no pass has.
    """
    names = [name_of(one) for one in passes]
    only, skip = list(only), list(skip)
    for name in (*only, *skip):
        if name not in names:
            raise PassError(
                f"unknown pass '{name}'{near_match(name, names)}; list them with `v4graph passes`."
            )
    return tuple(
        one
        for one, name in zip(passes, names, strict=True)
        if (not only or name in only) and name not in skip
    )


def run_passes(
    model: ir.Model,
    passes: Sequence[Pass],
    step: Step,
    watch: Callable[[Pass, int], None] | None = None,
    done: Callable[[PassReport], None] | None = None,
) -> list[PassReport]:
    """Run passes on `model` in place; `watch` is called before each, `done` after each.

    Raises:
        PassError: a pass failed; names it.
    """
    reports = []
    before = figures(model, step)
    for i, one in enumerate(passes):
        if watch:
            watch(one, i)
        started = time.perf_counter()
        modified = apply(one, model)
        seconds = time.perf_counter() - started
        after = figures(model, step) if modified else before
        reports.append(PassReport(name_of(one), modified, seconds, before, after))
        if done:
            done(reports[-1])
        before = after
    return reports


def apply(one: Pass, model: ir.Model) -> bool:
    """Run one pass in place and return whether it changed something.

    Raises:
        PassError: it raised an error, or made a new model instead of changing this one.
    """
    try:
        result = one(model)
    except Exception as error:  # a pass may be a user's, and raise anything
        raise PassError(f"pass {name_of(one)} failed: {type(error).__name__}: {error}") from error
    if result.model is not model:
        raise PassError(f"pass {name_of(one)} returns another model; make it an onnx_ir.passes.InPlacePass.")
    return bool(result.modified)
