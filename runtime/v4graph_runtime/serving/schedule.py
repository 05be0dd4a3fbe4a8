"""Which tokens of which slots run next: one step of continuous batching, as a list of runs of the graph.

Every slot has tokens that are not in its state yet: the rest of a prompt, or the one token that was just
sampled. A step runs one token of every slot that has one, so that no output waits for a prompt, and a
limited number of prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

# Slots next to each other run together while at most so large a part of the rows is padding.
MOST_PADDING = 1 / 3


@dataclass(frozen=True)
class Run:
    """One run of the graph on a range of slots; `counts` are the tokens of each, 0 for an idle one."""

    slots: range
    counts: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the graph's input, padding included."""
        return len(self.counts) * max(self.counts)


def shares(pending: Mapping[int, int], tokens: int) -> dict[int, int]:
    """Divide `tokens` among slots with `pending` tokens each.

    All get the same; what a short one leaves goes to the longer ones. Each gets one at least.
    """
    given: dict[int, int] = {}
    waiting = sorted(pending, key=lambda slot: (pending[slot], slot))
    for i, slot in enumerate(waiting):
        share = max(1, (tokens - sum(given.values())) // (len(waiting) - i))
        given[slot] = min(pending[slot], share)
    return given


def plan(pending: Mapping[int, int], tokens: int, longest: Mapping[int, int]) -> list[Run]:
    """Return the runs of one step, outputs first.

    Args:
        pending: Tokens of each slot that are not in its state, 1 or more.
        tokens: Prompt tokens of one step.
        longest: Tokens that a slot may take at most in one run.
    """
    ready = {slot: 1 for slot, count in pending.items() if count == 1}
    reading = {slot: min(count, longest[slot]) for slot, count in pending.items() if count > 1}
    runs = [_run(sorted(ready), ready)] if ready else []
    return [*runs, *_groups(shares(reading, tokens))]


def whole(runs: Iterable[Run], batch: int) -> Run:
    """Join the runs of a step to one on all slots, for a backend that cannot run a range of them."""
    counts = [0] * batch
    for run in runs:
        for slot, count in zip(run.slots, run.counts, strict=True):
            counts[slot] += count
    return Run(range(batch), tuple(counts))


def _groups(counts: Mapping[int, int]) -> Iterator[Run]:
    """Yield runs of slots near to each other with about as many tokens."""
    group: list[int] = []
    for slot in sorted(counts):
        grown = _run([*group, slot], counts)
        if group and sum(grown.counts) < (1 - MOST_PADDING) * grown.rows:
            yield _run(group, counts)
            group = []
        group.append(slot)
    if group:
        yield _run(group, counts)


def _run(slots: list[int], counts: Mapping[int, int]) -> Run:
    covered = range(slots[0], slots[-1] + 1)
    return Run(covered, tuple(counts[slot] if slot in slots else 0 for slot in covered))
