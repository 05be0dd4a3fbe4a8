"""The invariant the runtime stands on: any schedule of a sequence gives the same logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracles
import pytest
from engines import Built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4graph_runtime import Session

TOLERANCE = 1e-4
BATCH = 3


@dataclass(frozen=True)
class Step:
    """Feed each slot this many tokens, then take some back (to be fed again)."""

    counts: tuple[int, ...]
    back: tuple[int, ...]


def schedules(longest: int) -> st.SearchStrategy[list[Step]]:
    """Chunks that are single steps, idle slots, or cross the 4, 128 and window boundaries."""
    count = st.one_of(st.integers(0, 2), st.integers(3, 9), st.sampled_from([15, 16, 17, 31, 33, longest]))
    back = st.one_of(st.just(0), st.just(0), st.integers(0, 8))
    per_slot = [st.tuples(*[strategy] * BATCH) for strategy in (count, back)]
    return st.lists(st.builds(Step, *per_slot), min_size=4, max_size=16)


@dataclass(frozen=True)
class Whole:
    """A session, the tokens of each slot, and the logits of one prefill of them."""

    session: Session
    ids: np.ndarray
    logits: np.ndarray


def whole(built: Built, case: oracles.Case) -> Whole:
    ids = np.random.default_rng(5).integers(0, case.vocab, (BATCH, case.tokens))
    session = Session(built.engine, built.checkpoint, batch=BATCH)
    return Whole(session, ids, session.prefill(ids))


@pytest.fixture(scope="session")
def small_whole(small: Built) -> Whole:
    return whole(small, oracles.SMALL)


@pytest.fixture(scope="session")
def real_whole(real_ratios: Built) -> Whole:
    return whole(real_ratios, oracles.REAL_RATIOS)


def run(session: Session, ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Prefill the batch or, where an odd number of tokens comes, the slots from the first busy one on."""
    if counts.sum() % 2 == 0:
        return session.prefill(ids, counts)
    first = int(np.flatnonzero(counts)[0])
    logits = session.prefill(ids[first:], counts[first:], slots=range(first, BATCH))
    return np.concatenate([np.zeros((first, *logits.shape[1:]), np.float32), logits])


def check_schedule(case: Whole, steps: list[Step]) -> None:
    """Run a schedule and compare every row of logits that it produces."""
    session, ids = case.session, case.ids
    session.reset()
    written = np.zeros(BATCH, np.int64)
    for step in steps:
        start = session.position
        counts = np.minimum(step.counts, ids.shape[1] - start)
        chunk = np.full((BATCH, max(int(counts.max()), 1)), 1, np.int64)
        for slot, count in enumerate(counts):
            chunk[slot, :count] = ids[slot, start[slot] : start[slot] + count]
        logits = run(session, chunk, counts)
        for slot, count in enumerate(counts):
            if count:
                expected = case.logits[slot, start[slot] : start[slot] + count]
                difference = np.abs(logits[slot, :count] - expected).max()
                assert difference <= TOLERANCE, f"slot {slot} at {start[slot]}, {count} tokens"
        written = np.maximum(written, session.position)
        allowed = 8 - (written - session.position)
        session.rollback(np.minimum(np.minimum(step.back, allowed), session.position).clip(0))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=schedules(longest=60))
def test_any_schedule_gives_the_same_logits(small_whole: Whole, steps: list[Step]) -> None:
    check_schedule(small_whole, steps)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=schedules(longest=129))
def test_any_schedule_at_the_real_window_and_ratios(real_whole: Whole, steps: list[Step]) -> None:
    check_schedule(real_whole, steps)


@pytest.mark.parametrize("edge", [4, 8, 16, 64], ids=lambda edge: f"edge{edge}")
def test_every_boundary_can_be_crossed_by_one_token_and_taken_back(small_whole: Whole, edge: int) -> None:
    crossing = Step((1, 2, 1), (1, 2, 0))
    check_schedule(
        small_whole,
        [Step((edge - 1, edge - 1, edge), (0, 0, 0)), crossing, crossing, Step((9, 3, 1), (0, 0, 0))],
    )


def test_state_in_place_equals_double_buffers(small: Built) -> None:
    from v4graph_runtime.ort_backend import OrtOptions

    ids = np.random.default_rng(6).integers(0, oracles.SMALL.vocab, (BATCH, 80))
    logits = []
    for in_place in (True, False):
        options = OrtOptions(in_place=in_place)
        session = Session(small.engine, small.checkpoint, batch=BATCH, options=options)
        rows = [session.prefill(ids[:, :30], [30, 7, 0]), session.prefill(ids[:, 30:50])]
        rows += [session.decode(ids[:, 50 + t]) for t in range(20)]
        logits.append(rows)
    for ours, theirs in zip(*logits, strict=True):
        np.testing.assert_array_equal(ours, theirs)
