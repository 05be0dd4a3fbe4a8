"""Snapshots: state that leaves a session and comes back, and files that cannot be trusted."""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_engine import CAPACITY, RING, SLACK, VOCAB, ToyWeights, logits_of, write_graph
from toy_schedules import BATCH, TEXTS, TOLERANCE, Schedule, play, schedules
from toy_trt import ToyMachine, write_engine

from v4graph.errors import EngineError, SessionError
from v4graph.manifest import Manifest
from v4graph_runtime import Session, Snapshot, build_engine
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.state_contract import contract_of
from v4graph_runtime.weights import Fingerprint

ONE_THREAD = OrtOptions(threads=1)


@pytest.fixture
def session(all_logits_engine: Path, weights: ToyWeights) -> Session:
    return Session(all_logits_engine, weights, batch=BATCH, options=ONE_THREAD)


@pytest.fixture
def other(all_logits_engine: Path, weights: ToyWeights) -> Session:
    return Session(all_logits_engine, weights, batch=BATCH, options=ONE_THREAD)


@pytest.fixture(scope="module")
def expected(weights: ToyWeights) -> list[Any]:
    return [logits_of(text, weights) for text in TEXTS]


@pytest.fixture
def taken(session: Session) -> Snapshot:
    """Slot 1 after 20 tokens."""
    session.prefill(TEXTS[:, :20])
    return session.snapshot(1)


def changed(folder: Path, **fields: Any) -> Path:
    """Build the toy engine with other manifest fields."""
    build_engine(write_graph(folder / "graph", all_logits=True, **fields), folder / "engine")
    return folder / "engine"


def content(snapshot: Snapshot) -> Any:
    """Everything in a snapshot; in its bytes the order of the metadata is left to safetensors."""
    tensors = safetensors.numpy.load(snapshot.to_bytes())
    arrays = {name: (array.shape, array.tobytes()) for name, array in tensors.items()}
    return snapshot.contract.digest, snapshot.state.highest, arrays


def carried(sessions: Iterator[Session]) -> Any:
    def move(session: Session, amounts: list[int]) -> Session:
        """Take every slot as bytes to another session, in which the slots are in another order."""
        images = [session.snapshot(slot).to_bytes() for slot in range(BATCH)]
        target = next(sessions)
        target.reset()
        target.prefill(np.full((BATCH, 9), 3), [9, 4, 0])
        for slot in np.argsort(amounts):
            target.restore(Snapshot.from_bytes(images[slot]), int(slot))
        return target

    return move


def turned(session: Session, amounts: list[int]) -> Session:
    """Fork through a slot that gets its own state back afterwards."""
    source, target = amounts[0] % BATCH, amounts[1] % BATCH
    kept, at = session.snapshot(target), session.position[source]
    session.fork(source, target)
    assert session.position[target] == at
    assert session.tokens(target).tolist() == session.tokens(source).tolist()
    session.fork(target, source)
    session.restore(kept, target)
    if source == target:
        assert session.position[source] == at
    return session


@pytest.mark.parametrize("in_place", [True, False])
@settings(max_examples=30, deadline=None)
@given(schedule=schedules(moves=("carry", "turn")), chunk=st.integers(1, 20))
def test_any_schedule_through_snapshots_and_forks(
    in_place: bool,
    schedule: Schedule,
    chunk: int,
    all_logits_engine: Path,
    weights: ToyWeights,
    expected: list[Any],
) -> None:
    options = OrtOptions(threads=1, in_place=in_place)
    pair = [
        Session(all_logits_engine, weights, batch=BATCH, prefill_chunk=chunk, options=options)
        for _ in range(2)
    ]
    sessions = itertools.cycle(reversed(pair))
    play(pair[0], schedule, expected, {"carry": carried(sessions), "turn": turned})


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules(moves=("carry", "turn")))
def test_any_schedule_through_snapshots_in_tensorrt(
    schedule: Schedule, tmp_path_factory: pytest.TempPathFactory, weights: ToyWeights, expected: list[Any]
) -> None:
    engine = write_engine(tmp_path_factory.mktemp("trt") / "engine", all_logits=True)
    with pytest.MonkeyPatch.context() as patch:
        ToyMachine.of(engine).install(patch)
        with Session(engine, weights, batch=BATCH) as session:
            play(session, schedule, expected, {"carry": carried(itertools.repeat(session)), "turn": turned})


def test_a_snapshot_holds_only_rows_that_count(session: Session) -> None:
    session.prefill(TEXTS[:, :20], [20, 3, 0])
    session.rollback([2, 0, 0])
    shapes = []
    for slot in range(BATCH):
        state = session.snapshot(slot).state
        shapes.append([len(array) for array in (*state.rings.values(), *state.appended.values())])
    assert shapes == [[RING, 18], [3, 3], [0, 0]]


def test_what_an_earlier_text_left_in_a_slot_stays_behind(session: Session, other: Session) -> None:
    session.prefill(TEXTS[:, :40])
    for one in (session, other):
        one.reset()
        one.prefill(TEXTS[:, 20:24])
    assert content(session.snapshot(2)) == content(other.snapshot(2))


def test_bytes_are_a_safetensors_file(taken: Snapshot) -> None:
    tensors = safetensors.numpy.load(taken.to_bytes())
    assert tensors["tokens/ids"].tolist() == TEXTS[1, :20].tolist()
    assert tensors["rings/state.0.window"].shape == (RING, 8)
    assert taken.position == 20
    assert taken.nbytes == sum(array.nbytes for array in tensors.values())


def test_a_restored_slot_goes_on_and_goes_back(taken: Snapshot, other: Session, expected: list[Any]) -> None:
    other.restore(Snapshot.from_bytes(taken.to_bytes()))
    assert other.tokens().tolist() == taken.tokens.tolist() == TEXTS[1, :20].tolist()
    assert other.rollback_limit() == SLACK
    other.rollback([SLACK, 0, 0])
    logits = other.prefill(TEXTS[1:2, 20 - SLACK : 25], slots=range(1))
    np.testing.assert_allclose(logits[0], expected[1][20 - SLACK : 25], atol=TOLERANCE)


def test_a_snapshot_is_a_copy(taken: Snapshot, session: Session) -> None:
    before = content(taken)
    taken.tokens[:] = 0
    session.prefill(TEXTS[:, 20:30])
    session.reset()
    session.prefill(TEXTS[:, 30:])
    assert content(taken) == before


def test_capacity_is_no_part_of_the_contract(
    taken: Snapshot, tmp_path: Path, weights: ToyWeights, expected: list[Any]
) -> None:
    longer = Session(changed(tmp_path / "longer", max_seq_len=2 * CAPACITY), weights)
    longer.restore(taken)
    logits = longer.prefill(TEXTS[1:2, 20:30])
    np.testing.assert_allclose(logits[0], expected[1][20:30], atol=TOLERANCE)
    shorter = Session(changed(tmp_path / "shorter", max_seq_len=19), weights)
    with pytest.raises(
        SessionError, match=r"holds 20 tokens, the engine has room for 19; .*--max-seq-len 20"
    ):
        shorter.restore(taken)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"numerics": "v4"}, "its numerics is exact, this engine's v4"),
        ({"config_sha256": "abc"}, r"its config\.json is none, this engine's abc"),
        ({"rollback_slack": 2}, "its rollback slack is 3, this engine's 2"),
    ],
)
def test_another_engine_is_refused_by_the_part_that_differs(
    taken: Snapshot, tmp_path: Path, weights: ToyWeights, fields: dict[str, Any], message: str
) -> None:
    session = Session(changed(tmp_path, **fields), weights)
    session.prefill([[1, 2]])
    with pytest.raises(SessionError, match=rf"^this snapshot is of another engine: {message}; restore it"):
        session.restore(taken)
    assert session.position.tolist() == [2]


def test_other_weights_are_refused(taken: Snapshot, all_logits_engine: Path) -> None:
    with pytest.raises(SessionError, match=r"its weights are [0-9a-f]{60}, this engine's [0-9a-f]{60};"):
        Session(all_logits_engine, ToyWeights.random(1)).restore(taken)


def test_other_states_and_ops_are_told_by_the_first_that_differs(all_logits_engine: Path) -> None:
    manifest = Manifest.load(all_logits_engine)
    ring, cache = manifest.states
    wider = dataclasses.replace(ring, shape=("B", RING + 1, 8))
    ours = contract_of(manifest, "")
    theirs = contract_of(dataclasses.replace(manifest, states=(wider, cache)), "")
    assert ours.difference(theirs) == (
        "its state tensors are state.{i}.window of layers 0: ring float32 [9, 8], "
        "this engine's state.{i}.window of layers 0: ring float32 [10, 8]"
    )
    theirs = contract_of(dataclasses.replace(manifest, ops={"V4MoE": 2}), "")
    assert ours.difference(theirs) == "its op versions are none, this engine's V4MoE 2"
    assert ours.difference(contract_of(dataclasses.replace(manifest, max_seq_len=9), "")) is None


def test_the_fingerprint_reads_a_few_bytes_whether_arrays_are_kept_or_not() -> None:
    arrays = {name: np.arange(n, dtype=np.float32) for name, n in (("b", 5000), ("a", 1), ("c", 0))}

    def digest(keep: bool, **changes: Any) -> str:
        seen = Fingerprint()
        assert [name for name, _ in seen.watch({**arrays, **changes}.items(), keep=keep)]
        return seen.digest()

    assert digest(True) == digest(False) == digest(True, b=np.arange(10000, dtype=np.float32)[:5000])
    for at in (0, 100, 2500, 2600):
        other = arrays["b"].copy()
        other[at] += 1
        assert digest(True, b=other) != digest(True)
    strided = np.repeat(arrays["b"], 2)[::2]
    assert digest(False, b=strided) == digest(True)
    assert digest(True, b=arrays["b"].reshape(50, 100)) != digest(True)
    assert digest(True, b=arrays["b"].view(np.int32)) != digest(True)
    assert digest(True, d=arrays["b"]) != digest(True)


def test_sessions_of_the_same_engine_and_weights_have_one_contract(
    session: Session, other: Session, tmp_path: Path, weights: ToyWeights
) -> None:
    assert session.contract == other.contract
    assert len(session.contract) == 64
    longer = Session(changed(tmp_path, max_seq_len=2 * CAPACITY), weights)
    assert longer.contract == session.contract


def test_a_saved_snapshot_loads(taken: Snapshot, tmp_path: Path) -> None:
    path = tmp_path / "one.snapshot"
    path.write_bytes(b"what was there before")
    taken.save(path)
    assert content(Snapshot.load(path)) == content(taken)
    assert [entry.name for entry in tmp_path.iterdir()] == ["one.snapshot"]


def test_what_cannot_be_saved_or_read_is_told(
    taken: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SessionError, match=r"cannot be written \(No such file or directory\)"):
        taken.save(tmp_path / "missing" / "one.snapshot")
    with pytest.raises(SessionError, match=r"cannot be read \(No such file or directory\)"):
        Snapshot.load(tmp_path / "one.snapshot")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SessionError, match=r"cannot be written \(No space left on device\)"):
        taken.save(tmp_path / "one.snapshot")
    assert list(tmp_path.iterdir()) == []


def test_no_flipped_byte_goes_unnoticed(taken: Snapshot) -> None:
    data = taken.to_bytes()
    text = data.rindex(b"}", 0, 8 + int.from_bytes(data[:8], "little")) + 1
    flips = [*range(0, text, 7), *range(8 + int.from_bytes(data[:8], "little"), len(data), 11)]
    for at in flips:
        bad = bytearray(data)
        bad[at] ^= 0x5A
        with pytest.raises(SessionError):
            Snapshot.from_bytes(bytes(bad))


def test_no_cut_goes_unnoticed(taken: Snapshot, tmp_path: Path) -> None:
    data, path = taken.to_bytes(), tmp_path / "cut.snapshot"
    for length in [*range(20), *range(20, len(data), 37), len(data) - 1]:
        with pytest.raises(SessionError, match="damaged or cut off"):
            Snapshot.from_bytes(data[:length])
    with pytest.raises(SessionError, match="damaged or cut off"):
        Snapshot.from_bytes(data + b"\0")
    path.write_bytes(data[:-1])
    with pytest.raises(SessionError, match=r"cut\.snapshot: damaged or cut off: it has \d+ bytes"):
        Snapshot.load(path)


def test_other_files_and_versions_are_told_apart(taken: Snapshot) -> None:
    with pytest.raises(SessionError, match="expected a snapshot of v4graph, got something else"):
        Snapshot.from_bytes(safetensors.numpy.save({"a": np.zeros(3)}, metadata={"format": "pt"}))
    with pytest.raises(SessionError, match="no safetensors header with metadata"):
        Snapshot.from_bytes(safetensors.numpy.save({"a": np.zeros(3)}))
    newer = taken.to_bytes().replace(b'"version":"1"', b'"version":"7"')
    with pytest.raises(SessionError, match="written in format version 7, this v4graph reads 1"):
        Snapshot.from_bytes(newer)


def test_rows_that_no_session_writes_are_refused(taken: Snapshot, session: Session) -> None:
    state = taken.state
    for changes, message in (
        ({"rings": {}}, r"has nothing for 'state\.0\.window', expected float32 \[9, 8\]"),
        ({"appended": {"state.0.compressed": np.zeros((19, 8), np.float32)}}, r"has float32 \[19, 8\]"),
        ({"tokens": state.tokens + VOCAB}, "ids outside the engine's vocabulary"),
    ):
        odd = Snapshot(taken.contract, dataclasses.replace(state, **changes))
        with pytest.raises(SessionError, match=message):
            session.restore(Snapshot.from_bytes(odd.to_bytes()))
    assert session.position.tolist() == [20] * BATCH


def test_a_failure_while_restoring_empties_the_slot(
    taken: Snapshot, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise EngineError("the GPU fell off the bus")

    monkeypatch.setattr(session._backend, "write_state", fail)
    for call in (lambda: session.restore(taken, 2), lambda: session.fork(1, 2)):
        with pytest.raises(EngineError, match="fell off"):
            call()
        assert session.position.tolist() == [20, 20, 0]


def test_bfloat16_states_on_onnxruntimes_cuda_are_refused(
    session: Session, taken: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session._backend, "movable_states", False)
    assert not session.movable_states
    for call in (session.snapshot, lambda: session.restore(taken), lambda: session.fork(0, 1)):
        with pytest.raises(SessionError, match="no snapshots, restore or fork; build the engine with"):
            call()
    assert session.position.tolist() == [20] * BATCH


def test_a_closed_session_has_no_state(session: Session) -> None:
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.snapshot()


def test_the_contract_is_in_the_file_part_by_part(taken: Snapshot) -> None:
    data = taken.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    parts = json.loads(header["__metadata__"]["contract"])
    assert sorted(parts) == ["config", "dtype", "numerics", "ops", "rollback_slack", "states", "weights"]
