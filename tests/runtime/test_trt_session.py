"""The real session on the real TensorRT backend, over a TensorRT and a GPU that are played in host memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_engine import CAPACITY, VOCAB, ToyWeights, logits_of
from toy_schedules import BATCH, TEXTS, TOLERANCE, Schedule, play, schedules
from toy_trt import MAX_INPUT, ToyMachine, write_engine

from v4graph.errors import EngineError
from v4graph_runtime import Session
from v4graph_runtime.trt_backend import TrtOptions

Play = Callable[..., ToyMachine]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(tmp_path_factory.mktemp("trt") / "engine", all_logits=True)


@pytest.fixture(scope="module")
def expected(weights: ToyWeights) -> list[Any]:
    return [logits_of(text, weights) for text in TEXTS]


@pytest.fixture
def machine(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    return lambda **options: ToyMachine.of(engine_dir, **options).install(monkeypatch)


@pytest.mark.parametrize("rtx", [True, False])
@pytest.mark.parametrize("cuda_graph", [True, False])
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules(), chunk=st.integers(1, 40))
def test_any_schedule_gives_the_same_logits(
    rtx: bool,
    cuda_graph: bool,
    schedule: Schedule,
    chunk: int,
    engine_dir: Path,
    machine: Play,
    weights: ToyWeights,
    expected: list[Any],
) -> None:
    machine(rtx=rtx)
    options = TrtOptions(cuda_graph=cuda_graph, runtime_cache=False)
    with Session(engine_dir, weights, batch=BATCH, prefill_chunk=chunk, options=options) as session:
        play(session, schedule, expected)


def test_steps_after_the_first_replay_one_captured_graph(
    engine_dir: Path, machine: Play, weights: ToyWeights, expected: list[Any]
) -> None:
    toy = machine()
    with Session(engine_dir, weights, batch=BATCH) as session:
        session.prefill(TEXTS[:, :20])
        assert (toy.device.captures, toy.device.launches) == (0, 0)
        for t in range(20, 30):
            logits = session.decode(TEXTS[:, t], [1, 1, int(t < 25)])
            np.testing.assert_allclose(logits[:2, 0], [e[t] for e in expected[:2]], atol=TOLERANCE)
        # The first step runs plainly, the second is captured.
        assert (toy.device.captures, toy.device.launches) == (1, 9)
        # Other lengths do not disturb the captured context.
        session.prefill(TEXTS[:2, 30:33].repeat([1, 2], 0), [3, 3, 0])
        logits = session.decode(TEXTS[[0, 1, 2], [33, 33, 25]])
        want = [e[at] for e, at in zip(expected, (33, 33, 25), strict=True)]
        np.testing.assert_allclose(logits[:, 0], want, atol=TOLERANCE)
        assert (toy.device.captures, toy.device.launches) == (1, 10)


def test_without_cuda_graphs_every_step_is_enqueued(
    engine_dir: Path, machine: Play, weights: ToyWeights
) -> None:
    toy = machine()
    with Session(engine_dir, weights, options=TrtOptions(cuda_graph=False)) as session:
        for token in range(5):
            session.decode([token])
    assert (toy.device.captures, toy.device.launches) == (0, 0)
    assert sum(context.executions for context in toy.trt.contexts) == 5


def test_plugins_that_cannot_be_captured_run_plainly(
    engine_dir: Path, machine: Play, weights: ToyWeights
) -> None:
    toy = machine()
    toy.host.capturable = False
    with Session(engine_dir, weights) as session:
        for token in range(5):
            session.decode([token])
    assert toy.device.captures == 0


@pytest.mark.parametrize(("broken", "reason"), [("capture", "failed while running"), ("capturable", "says")])
def test_a_failed_capture_falls_back_with_one_warning(
    engine_dir: Path,
    machine: Play,
    weights: ToyWeights,
    expected: list[Any],
    broken: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    toy = machine()
    toy.trt.broken = broken
    with Session(engine_dir, weights) as session:
        for t in range(6):
            logits = session.decode(TEXTS[:1, t])
            np.testing.assert_allclose(logits[0, 0], expected[0][t], atol=TOLERANCE)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "decoding without a CUDA graph" in warnings[0]
    assert reason in warnings[0]
    assert toy.device.launches == 0


@pytest.mark.parametrize(
    ("tokens", "profiles"), [(1, [0]), (2, [0, 0]), (8, [0, 0]), (9, [0, 1]), (MAX_INPUT, [0, 1])]
)
def test_a_run_takes_the_first_profile_that_holds_its_tokens(
    engine_dir: Path, machine: Play, weights: ToyWeights, tokens: int, profiles: list[int]
) -> None:
    toy = machine()
    with Session(engine_dir, weights) as session:
        session.prefill(TEXTS[:1, :tokens])
        # The first context is that of one-token steps.
        assert [context.profile for context in toy.trt.contexts] == profiles


def test_a_long_prompt_is_run_in_pieces_that_fit_the_profile(
    engine_dir: Path, machine: Play, weights: ToyWeights, expected: list[Any]
) -> None:
    machine()
    with Session(engine_dir, weights, prefill_chunk=1000) as session:
        assert session.prefill_chunk == MAX_INPUT
        logits = session.prefill(TEXTS[:1, :CAPACITY])
        np.testing.assert_allclose(logits[0], expected[0], atol=TOLERANCE)


def test_a_failed_run_is_told_first_in_our_words_and_empties_the_slots(
    engine_dir: Path, machine: Play, weights: ToyWeights
) -> None:
    toy = machine()
    with Session(engine_dir, weights, batch=2) as session:
        session.prefill([[1, 2], [3, 4]])
        toy.trt.broken = "execute"
        toy.host.findings.texts.append("layers.0.attn: V4WindowAttention cannot run.")
        with pytest.raises(EngineError) as error:
            session.decode([1, 2], [1, 0])
        assert str(error.value).splitlines() == [
            "TensorRT failed while running the engine; slots [0] were reset.",
            "layers.0.attn: V4WindowAttention cannot run.",
            "TensorRT: enqueue failed",
        ]
        assert session.position.tolist() == [0, 2]
        toy.trt.broken = ""
        session.decode([1, 2])


def test_last_token_logits_are_copied_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: ToyWeights, expected: list[Any]
) -> None:
    engine = write_engine(tmp_path / "engine")
    ToyMachine.of(engine).install(monkeypatch)
    with Session(engine, weights, batch=BATCH) as session:
        logits = session.prefill(TEXTS[:, :20], [20, 9, 17])
        assert logits.shape == (BATCH, VOCAB)
        want = [e[n - 1] for e, n in zip(expected, (20, 9, 17), strict=True)]
        np.testing.assert_allclose(logits, want, atol=TOLERANCE)


def test_a_range_of_slots_runs_the_whole_batch_with_the_others_idle(
    engine_dir: Path, machine: Play, weights: ToyWeights, expected: list[Any]
) -> None:
    machine()
    with Session(engine_dir, weights, batch=BATCH) as session:
        assert not session.slot_ranges
        session.prefill(TEXTS[1:, :5], [5, 3], slots=range(1, 3))
        for t in range(5, 9):
            logits = session.decode(TEXTS[1:2, t], slots=range(1, 2))
            assert logits.shape == (1, 1, VOCAB)
            np.testing.assert_allclose(logits[0, 0], expected[1][t], atol=TOLERANCE)
        assert session.position.tolist() == [0, 9, 3]
