"""The invariant the runtime stands on: any schedule of a sequence gives the same logits.

Schedules go through ranges of slots, snapshots, forks and the prefix cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import oracles
import pytest
from engines import Built
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from v4graph_runtime import PrefixCache, Session, Snapshot

TOLERANCE = 1e-4
BATCH = 3
CACHE_BYTES = 4_000_000


@dataclass(frozen=True)
class Step:
    """Feed each slot this many tokens, take some back (to be fed again), then move the state of a slot."""

    counts: tuple[int, ...]
    back: tuple[int, ...]
    move: str = "stay"
    slot: int = 0


def schedules(longest: int) -> st.SearchStrategy[list[Step]]:
    """Chunks that are single steps, idle slots, or cross the 4, 128 and window boundaries."""
    count = st.one_of(st.integers(0, 2), st.integers(3, 9), st.sampled_from([15, 16, 17, 31, 33, longest]))
    back = st.one_of(st.just(0), st.just(0), st.integers(0, 8))
    per_slot = [st.tuples(*[strategy] * BATCH) for strategy in (count, back)]
    move = st.sampled_from(["stay", "stay", "carry", "fork", "reuse"])
    steps = st.builds(Step, *per_slot, move, st.integers(0, BATCH - 1))
    return st.lists(steps, min_size=4, max_size=16)


@dataclass(frozen=True)
class Whole:
    """Two sessions and a cache, the tokens of each slot, and the logits of one prefill of them."""

    session: Session
    other: Session
    cache: PrefixCache
    ids: np.ndarray
    logits: np.ndarray


def whole(built: Built, case: oracles.Case) -> Whole:
    ids = np.random.default_rng(5).integers(0, case.vocab, (BATCH, case.tokens))
    session, other = (Session(built.engine, built.checkpoint, batch=BATCH) for _ in range(2))
    # Little room: segments go while others still come.
    cache = PrefixCache(max_bytes=CACHE_BYTES)
    return Whole(session, other, cache, ids, session.prefill(ids))


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
    session, other, ids = case.session, case.other, case.ids
    session.reset()
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
        session.rollback(np.minimum(step.back, [session.rollback_limit(slot) for slot in range(BATCH)]))
        if step.move == "carry":
            carry(session, other)
            session, other = other, session
        elif step.move == "fork":
            fork(session, step.slot)
        elif step.move == "reuse":
            reuse(session, step.slot, case)


def carry(session: Session, other: Session) -> None:
    """Take every slot to another session, as bytes."""
    for slot in range(BATCH):
        other.restore(Snapshot.from_bytes(session.snapshot(slot).to_bytes()), slot)


def fork(session: Session, slot: int) -> None:
    """Send a slot's state through another slot, which gets its own back."""
    neighbour = (slot + 1) % BATCH
    kept = session.snapshot(neighbour)
    session.fork(slot, neighbour)
    session.reset([slot])
    session.fork(neighbour, slot)
    session.restore(kept, neighbour)


def reuse(session: Session, slot: int, case: Whole) -> None:
    """Keep a slot's state and begin its text again with what the cache has of it, or another slot's state."""
    case.cache.store(session, slot)
    at = int(session.position[slot])
    session.reset([slot])
    length = case.cache.reuse(session, slot, case.ids[slot, : at + 2])
    # The last token of the whole text is run again; the cache has no room for what is longer than it.
    assert length >= min(at, case.ids.shape[1] - 1) or case.cache.stats.bytes > CACHE_BYTES // 2
    assert session.tokens(slot).tolist() == case.ids[slot, :length].tolist()


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
