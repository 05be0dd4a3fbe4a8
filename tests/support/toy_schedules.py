"""Random schedules for the toy engine: ragged appends, rejected tokens, rollbacks and resets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from toy_engine import CAPACITY, SLACK, VOCAB

from v4graph_runtime import Session

TOLERANCE = 1e-4
BATCH = 3
TEXTS = np.random.default_rng(7).integers(0, VOCAB, (BATCH, CAPACITY))
Schedule = list[tuple[str, list[int]]]
Move = Callable[[Session, list[int]], Session]


@st.composite
def schedules(draw: st.DrawFn, moves: tuple[str, ...] = ()) -> Schedule:
    """Steps of ragged appends, rollbacks, resets and `moves`; what does not fit is trimmed when run."""
    step = st.tuples(
        st.sampled_from(["append", "append", "append", "rollback", "reset", *moves]),
        st.lists(st.integers(0, 14), min_size=BATCH, max_size=BATCH),
    )
    return draw(st.lists(step, min_size=1, max_size=25))


def covering(counts: Any) -> range | None:
    """Return the range of the slots with tokens for every other total, None (all slots) for the rest."""
    busy = np.flatnonzero(counts)
    return range(int(busy[0]), int(busy[-1]) + 1) if counts.sum() % 2 else None


def run(session: Session, ids: Any, counts: Any) -> Any:
    """Prefill the batch, or only a range of slots: return logits of all slots."""
    slots = covering(counts)
    if slots is None:
        return session.prefill(ids, counts)
    rows = slice(slots.start, slots.stop)
    logits = np.zeros((*ids.shape, VOCAB), np.float32)
    logits[rows] = session.prefill(ids[rows], counts[rows], slots=slots)
    return logits


def play(
    session: Session, schedule: Schedule, expected: list[Any], moves: dict[str, Move] | None = None
) -> None:
    """Run a schedule on a session with all logits and compare each with those of the whole texts.

    A move takes the session and the amounts, and returns the session to go on with, in which every slot
    holds what it held before and can go back as far.
    """
    highest = np.zeros(BATCH, np.int64)
    for action, amounts in schedule:
        at = session.position
        if moves and action in moves:
            limits = [session.rollback_limit(slot) for slot in range(BATCH)]
            session = moves[action](session, amounts)
            assert session.position.tolist() == at.tolist()
            assert [session.rollback_limit(slot) for slot in range(BATCH)] == limits
        elif action == "reset":
            slots = [slot for slot, amount in enumerate(amounts) if amount > 10]
            session.reset(slots)
            highest[slots] = 0
        elif action == "rollback":
            back = np.clip(np.minimum(amounts, at - np.maximum(highest - SLACK, 0)), 0, None)
            session.rollback(back)
            assert session.position.tolist() == (at - back).tolist()
        else:
            counts = np.minimum(amounts, CAPACITY - at)
            ids = np.full((BATCH, max(int(counts.max()), 1)), -1)
            for slot, count in enumerate(counts):
                ids[slot, :count] = TEXTS[slot, at[slot] : at[slot] + count]
            if (highest <= at).all():
                # Rejected tokens first, as speculation writes them: the right ones must replace them.
                wrong = np.minimum(counts, SLACK)
                run(session, np.where(ids >= 0, (ids + 1) % VOCAB, ids), wrong)
                session.rollback(wrong)
            logits = run(session, ids, counts)
            highest = np.maximum(highest, session.position)
            for slot, count in enumerate(counts):
                want = expected[slot][at[slot] : at[slot] + count]
                np.testing.assert_allclose(logits[slot, :count], want, atol=TOLERANCE)
                assert session.tokens(slot).tolist() == TEXTS[slot, : at[slot] + count].tolist()
