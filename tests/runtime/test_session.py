from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import CAPACITY, SLACK, VOCAB, ToyWeights, logits_of
from toy_schedules import BATCH, TEXTS, TOLERANCE, Schedule, play, schedules

from v4graph.errors import EngineError, SessionError
from v4graph_runtime import Session
from v4graph_runtime.ort_backend import OrtOptions


@pytest.fixture
def session(engine: Path, weights: ToyWeights) -> Session:
    return Session(engine, weights, batch=BATCH)


@pytest.fixture
def all_logits(all_logits_engine: Path, weights: ToyWeights) -> Session:
    return Session(all_logits_engine, weights, batch=BATCH)


@pytest.fixture(scope="module")
def expected(weights: ToyWeights) -> list[Any]:
    return [logits_of(text, weights) for text in TEXTS]


def test_prefill_gives_the_logits_of_the_last_token(session: Session, expected: list[Any]) -> None:
    logits = session.prefill(TEXTS[:, :20])
    assert (logits.dtype, logits.shape) == (np.float32, (BATCH, VOCAB))
    np.testing.assert_allclose(logits, [e[19] for e in expected], atol=TOLERANCE)
    assert session.position.dtype == np.int32
    assert session.position.tolist() == [20] * BATCH


def test_decode_matches_prefill_at_every_position(session: Session, expected: list[Any]) -> None:
    for t in range(CAPACITY):
        ids = TEXTS[:, t] if t % 2 else TEXTS[:, t : t + 1]
        np.testing.assert_allclose(session.decode(ids), [e[t] for e in expected], atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 13, CAPACITY, 1000])
def test_pieces_of_a_prompt_give_what_one_call_gives(
    engine: Path, weights: ToyWeights, expected: list[Any], chunk: int
) -> None:
    counts = [33, 0, 12]
    session = Session(engine, weights, batch=BATCH, prefill_chunk=chunk)
    logits = session.prefill(TEXTS[:, :40], counts)
    assert session.position.tolist() == counts
    for slot in (0, 2):
        np.testing.assert_allclose(logits[slot], expected[slot][counts[slot] - 1], atol=TOLERANCE)
    assert not logits[1].any()
    np.testing.assert_allclose(session.decode(TEXTS[range(BATCH), counts])[1], expected[1][0], atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, CAPACITY])
def test_all_logits_join_the_pieces(
    all_logits_engine: Path, weights: ToyWeights, expected: list[Any], chunk: int
) -> None:
    counts = [20, 3, 0]
    session = Session(all_logits_engine, weights, batch=BATCH, prefill_chunk=chunk)
    logits = session.prefill(TEXTS[:, :22], counts)
    assert logits.shape == (BATCH, 22, VOCAB)
    for slot, count in enumerate(counts):
        np.testing.assert_allclose(logits[slot, :count], expected[slot][:count], atol=TOLERANCE)
        assert not logits[slot, count:].any()
    assert session.decode(TEXTS[:, 0]).shape == (BATCH, 1, VOCAB)


@pytest.mark.parametrize("in_place", [True, False])
@settings(max_examples=40, deadline=None)
@given(schedule=schedules(), chunk=st.integers(1, 20))
def test_any_schedule_gives_the_same_logits(
    in_place: bool,
    schedule: Schedule,
    chunk: int,
    all_logits_engine: Path,
    weights: ToyWeights,
    expected: list[Any],
) -> None:
    options = OrtOptions(threads=1, in_place=in_place)
    session = Session(all_logits_engine, weights, batch=BATCH, prefill_chunk=chunk, options=options)
    play(session, schedule, expected)


def test_replayed_tokens_give_the_same_logits(session: Session, expected: list[Any]) -> None:
    session.prefill(TEXTS[:, :30])
    session.rollback([SLACK, 0, 1])
    ids = np.stack([np.resize(TEXTS[b, p:30], SLACK) for b, p in enumerate((30 - SLACK, 0, 29))])
    logits = session.prefill(ids, [SLACK, 0, 1])
    np.testing.assert_allclose(logits[0], expected[0][29], atol=TOLERANCE)
    np.testing.assert_allclose(logits[2], expected[2][29], atol=TOLERANCE)
    np.testing.assert_allclose(session.decode(TEXTS[:, 30]), [e[30] for e in expected], atol=TOLERANCE)


def test_rollback_counts_from_the_highest_position(session: Session) -> None:
    session.prefill(TEXTS[:, :10])
    session.rollback([2, 0, 0])
    with pytest.raises(
        SessionError, match=r"slot 0: cannot roll back 2 tokens from position 8, 1 are possible"
    ):
        session.rollback([2, 0, 0])
    with pytest.raises(SessionError, match="--rollback-slack"):
        session.rollback([0, SLACK + 1, 0])
    session.rollback([1, 0, 0])
    assert session.position.tolist() == [7, 10, 10]


def test_rollback_never_passes_the_start(session: Session) -> None:
    session.prefill(TEXTS[:, :2])
    with pytest.raises(SessionError, match="2 are possible"):
        session.rollback([3, 0, 0])
    session.rollback([2, 0, 0])
    session.reset([1])
    with pytest.raises(
        SessionError, match="slot 1: cannot roll back 1 tokens from position 0, 0 are possible"
    ):
        session.rollback([0, 1, 0])


def test_reset_empties_the_named_slots_only(session: Session, expected: list[Any]) -> None:
    session.prefill(TEXTS[:, :CAPACITY])
    session.reset(slots=[1])
    assert session.position.tolist() == [CAPACITY, 0, CAPACITY]
    logits = session.decode(TEXTS[:, 0], [0, 1, 0])
    np.testing.assert_allclose(logits[1], expected[1][0], atol=TOLERANCE)
    session.reset()
    assert session.position.tolist() == [0, 0, 0]
    np.testing.assert_allclose(session.prefill(TEXTS[:, :9]), [e[8] for e in expected], atol=TOLERANCE)


def test_a_slot_without_room_is_named_and_nothing_changes(session: Session, expected: list[Any]) -> None:
    session.prefill(TEXTS[:, :60], [10, 60, 10])
    with pytest.raises(SessionError) as error:
        session.prefill(TEXTS[:, :5])
    assert str(error.value) == (
        "slot 1: 5 tokens after 60 need 65 positions but the engine holds 64; export again with "
        "`v4graph export --max-seq-len 65` or reset the slot."
    )
    assert session.position.tolist() == [10, 60, 10]
    np.testing.assert_allclose(
        session.prefill(TEXTS[:, 60:64], [0, 4, 0])[1], expected[1][63], atol=TOLERANCE
    )


BAD_CALLS = [
    ("prefill", ([[1, 2]],), r"ids has shape \[1, 2\], expected \[3, S\]"),
    ("prefill", (np.zeros((3, 0), np.int64),), r"ids has shape \[3, 0\]"),
    ("prefill", ([1, 2, 3],), r"ids has shape \[3\]"),
    ("prefill", (np.zeros((3, 2), np.float32),), "ids has dtype float32, expected integers"),
    ("prefill", (np.zeros((3, 2), bool),), "ids has dtype bool"),
    ("prefill", ([[1], [1, 2], [3]],), "ids is not a rectangular array"),
    ("prefill", ([[1], [VOCAB], [3]],), "slot 1: token id 23 in column 0 is outside the vocabulary, 0 to 22"),
    ("prefill", ([[1], [2], [-1]],), "slot 2: token id -1"),
    ("prefill", ([[1], [2], [3]], [1, 1, 2]), "slot 2: num_tokens is 2, expected 0 to 1"),
    ("prefill", ([[1], [2], [3]], [1, -1, 1]), "slot 1: num_tokens is -1"),
    ("prefill", ([[1], [2], [3]], [1, 2**40, 1]), "slot 1: num_tokens is 1099511627776"),
    ("prefill", ([[1], [2], [3]], [1, 1]), r"num_tokens has shape \[2\], expected one number per slot \[3\]"),
    ("prefill", ([[1], [2], [3]], [1.0, 1.0, 1.0]), "num_tokens has dtype float64"),
    ("decode", (np.zeros((3, 2), np.int64),), r"ids has shape \[3, 2\], decode takes \[3\] or \[3, 1\]"),
    ("rollback", ([1, 1],), r"tokens has shape \[2\]"),
    ("rollback", ([0, -1, 0],), r"tokens is \[0, -1, 0\]"),
    ("reset", ([3],), "slot 3 does not exist, the batch has slots 0 to 2"),
    ("reset", ([-1],), "slot -1 does not exist"),
    ("tokens", (3,), "slot 3 does not exist"),
    ("rollback_limit", (-1,), "slot -1 does not exist"),
]
RANGES = [range(0), range(2, 2), range(4), range(-1, 1), range(0, 3, 2), range(2, 0, -1)]


@pytest.mark.parametrize(("method", "arguments", "message"), BAD_CALLS)
def test_a_bad_call_is_refused_and_changes_nothing(
    session: Session, method: str, arguments: tuple[Any, ...], message: str
) -> None:
    session.prefill(TEXTS[:, :4])
    with pytest.raises(SessionError, match=message):
        getattr(session, method)(*arguments)
    assert session.position.tolist() == [4, 4, 4]


def test_padding_may_hold_anything(session: Session, expected: list[Any]) -> None:
    ids = np.where(np.arange(8) < 5, TEXTS[:, :8], -999)
    np.testing.assert_allclose(session.prefill(ids, [5, 5, 5]), [e[4] for e in expected], atol=TOLERANCE)


def test_a_call_with_idle_slots_only_changes_nothing(session: Session) -> None:
    assert not session.prefill(TEXTS[:, :3], [0, 0, 0]).any()
    assert session.position.tolist() == [0, 0, 0]


def test_returned_arrays_are_the_callers(session: Session) -> None:
    first = session.prefill(TEXTS[:, :3])
    kept = first.copy()
    session.position[:] = 50
    session.decode(TEXTS[:, 3])
    np.testing.assert_array_equal(first, kept)
    assert session.position.tolist() == [4, 4, 4]


@pytest.mark.parametrize("error", [EngineError("out of memory"), MemoryError(), KeyboardInterrupt()])
def test_a_call_that_fails_in_its_second_piece_leaves_no_slot_half_read(
    engine: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    session = Session(engine, weights, batch=3, prefill_chunk=4)
    session.prefill(TEXTS[:, :2])
    run, left = session._backend.run, [1, 0]  # type: ignore[union-attr]

    def fail(*arguments: Any) -> None:
        run(*arguments)
        if not left.pop(0):
            raise error

    monkeypatch.setattr(session._backend, "run", fail)
    with pytest.raises(type(error)):
        session.prefill(TEXTS[:, :6], [3, 6, 0])
    assert session.position.tolist() == [0, 0, 2]


def test_a_failed_run_empties_the_slots_that_it_touched(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.prefill(TEXTS[:, :4])

    def fail(*_: Any) -> None:
        raise EngineError("onnxruntime failed while running the graph: out of memory")

    monkeypatch.setattr(session._backend, "run", fail)
    with pytest.raises(EngineError, match=r"out of memory; slots \[0, 2\] were reset"):
        session.decode(TEXTS[:, 4], [1, 0, 1])
    assert session.position.tolist() == [0, 4, 0]


def test_a_closed_session_says_so(engine: Path, weights: ToyWeights) -> None:
    with Session(engine, weights) as session:
        session.prefill([[1, 2]])
    with pytest.raises(SessionError, match="this session is closed; open a new one"):
        session.decode([1])
    session.close()


@pytest.mark.parametrize("argument", ["batch", "prefill_chunk"])
def test_a_session_needs_positive_sizes(engine: Path, weights: ToyWeights, argument: str) -> None:
    with pytest.raises(SessionError, match=f"{argument} is 0, expected at least 1"):
        Session(engine, weights, **{argument: 0})


@pytest.mark.parametrize("in_place", [True, False])
def test_a_range_of_slots_leaves_the_others_alone(
    engine: Path, weights: ToyWeights, expected: list[Any], in_place: bool
) -> None:
    session = Session(engine, weights, batch=BATCH, options=OrtOptions(in_place=in_place))
    assert session.slot_ranges == in_place
    session.prefill(TEXTS[:, :9], [4, 9, 7])
    logits = session.prefill(TEXTS[1:, 9:14], [5, 0], slots=range(1, 3))
    assert logits.shape == (2, VOCAB)
    np.testing.assert_allclose(logits[0], expected[1][13], atol=TOLERANCE)
    (last,) = session.decode([TEXTS[2, 7]], slots=range(2, 3))
    np.testing.assert_allclose(last, expected[2][7], atol=TOLERANCE)
    assert session.position.tolist() == [4, 14, 8]
    logits = session.decode(TEXTS[range(BATCH), [4, 14, 8]])
    for slot, at in enumerate((4, 14, 8)):
        np.testing.assert_allclose(logits[slot], expected[slot][at], atol=TOLERANCE)


def test_a_range_runs_only_its_slots(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    run = session._backend.run

    def seen(inputs: Any, *rest: Any) -> None:
        shapes.append(inputs["input_ids"].shape)
        run(inputs, *rest)

    monkeypatch.setattr(session._backend, "run", seen)
    session.prefill(TEXTS[1:2, :5], slots=range(1, 2))
    session.decode(TEXTS[1:, 5], [1, 0], slots=range(1, 3))
    assert shapes == [(1, 5), (2, 1)]


def test_bindings_of_ranges_are_made_once_and_the_oldest_are_let_go(
    engine: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("v4graph_runtime.ort_backend.RANGES", 2)
    session = Session(engine, weights, batch=4)
    kept = session._backend._ranges
    for first in (0, 1, 0, 2, 3, 0):
        session.decode([5], slots=range(first, first + 1))
    assert list(kept) == [range(3, 4), range(1)]
    binding = kept[range(1)]
    session.decode([5], slots=range(1))
    assert kept[range(1)] is binding


@pytest.mark.parametrize("slots", RANGES, ids=str)
def test_a_range_that_the_batch_does_not_have_is_refused(session: Session, slots: range) -> None:
    for call in (session.prefill, session.decode):
        with pytest.raises(
            SessionError, match=r"slots is range\(.*, expected range\(first, stop\) with 0 <="
        ):
            call(np.ones((len(slots), 1), np.int64), slots=slots)


def test_errors_name_the_slot_of_the_batch(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        (([[1], [VOCAB]],), "slot 2: token id 23 in column 0"),
        (([[1], [1]], [1, 2]), "slot 2: num_tokens is 2"),
        ((np.ones((2, CAPACITY + 1), np.int64),), "slot 1: 65 tokens after 0"),
        (([[1]],), r"ids has shape \[1, 1\], expected \[2, S\]"),
    ]
    for arguments, message in calls:
        with pytest.raises(SessionError, match=message):
            session.prefill(*arguments, slots=range(1, 3))

    def fail(*_: Any) -> None:
        raise EngineError("out of memory")

    session.prefill(TEXTS[:, :4])
    monkeypatch.setattr(session._backend, "run", fail)
    with pytest.raises(EngineError, match=r"slots \[2\] were reset"):
        session.decode(TEXTS[1:, 4], [0, 1], slots=range(1, 3))
    assert session.position.tolist() == [4, 4, 0]


def test_a_slots_tokens_are_those_of_its_state(session: Session) -> None:
    session.prefill(TEXTS[:, :10], [10, 0, 3])
    session.rollback([2, 0, 0])
    session.decode([5, 6, 7], [1, 1, 0])
    assert session.tokens(0).tolist() == [*TEXTS[0, :8].tolist(), 5]
    assert (session.tokens(1).tolist(), session.tokens(2).tolist()) == ([6], TEXTS[2, :3].tolist())
    assert session.tokens(0).dtype == np.int32
    session.reset([0])
    assert session.tokens(0).tolist() == []


def test_the_rollback_limit_is_what_rollback_takes(session: Session) -> None:
    session.prefill(TEXTS[:, :10], [10, 2, 0])
    assert [session.rollback_limit(slot) for slot in range(BATCH)] == [SLACK, 2, 0]
    session.rollback([2, 0, 0])
    assert session.rollback_limit(0) == SLACK - 2
    session.decode([5, 5, 5])
    assert session.rollback_limit(0) == SLACK - 1
