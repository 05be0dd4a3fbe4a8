"""The CUDA provider's path through the real backend, on a device that is played in host memory."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_ort import Device, install, working_module
from toy_engine import CAPACITY, VOCAB, ToyWeights, logits_of, toy_manifest, write_graph

from v4graph.errors import EngineError
from v4graph_runtime import Session, build_engine
from v4graph_runtime.ort_backend import OrtBackend, OrtOptions, OrtValues
from v4graph_runtime.state import state_tensors

CUDA = OrtOptions(provider="cuda")


@pytest.fixture(params=[False, True], ids=["bound_in_place", "copied_at_binding"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    module, device = working_module(copies_at_binding=request.param)
    install(monkeypatch, module)
    return device


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.usefixtures("device")
def test_any_schedule_gives_the_logits_of_the_whole_sequence(
    engine: Path, weights: ToyWeights, in_place: bool
) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, (2, 20))
    options = OrtOptions(provider="cuda", in_place=in_place)
    session = Session(engine, weights, batch=2, options=options)
    session.prefill(ids[:, :9], num_tokens=[9, 4])
    session.prefill(ids[:, 4:9], num_tokens=[0, 5])
    for at in range(9, 12):
        session.decode(ids[:, at])
    session.rollback([2, 2])
    logits = session.prefill(ids[:, 10:])
    for row, sequence in zip(logits, ids, strict=True):
        np.testing.assert_allclose(row, logits_of(sequence, weights)[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.usefixtures("device")
def test_a_slots_state_leaves_the_device_and_comes_back(
    engine: Path, weights: ToyWeights, in_place: bool
) -> None:
    ids = np.random.default_rng(2).integers(0, VOCAB, (2, 20))
    options = OrtOptions(provider="cuda", in_place=in_place)
    session, other = (Session(engine, weights, batch=2, options=options) for _ in range(2))
    assert session.movable_states
    assert not session.slot_ranges
    session.prefill(ids[:, :9])
    other.prefill(ids[:, ::-1][:, :5])
    other.restore(session.snapshot(1), 0)
    other.fork(0, 1)
    logits = other.prefill(np.stack([ids[1, 9:], ids[1, 9:]]))
    for row in logits:
        np.testing.assert_allclose(row, logits_of(ids[1], weights)[-1], rtol=1e-4, atol=1e-4)
    assert other.contract == session.contract


@pytest.mark.usefixtures("device")
def test_the_contract_is_that_of_the_cpu(
    engine: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cuda = Session(engine, weights, options=CUDA).contract
    monkeypatch.undo()
    assert Session(engine, weights).contract == on_cuda


def test_weights_and_states_are_copied_to_the_device_once(
    engine: Path, weights: ToyWeights, device: Device
) -> None:
    states = list(state_tensors(toy_manifest(), 1))
    backend = OrtBackend(engine / "model.onnx", weights.arrays, states, CUDA)
    assert len(device.uploads) == len(weights.arrays) + len(states)
    assert backend.state_bytes == sum(state.nbytes for state in states)
    step = {"input_ids": np.array([[3]]), "start_pos": np.array([0], "i4"), "num_tokens": np.array([1], "i4")}
    backend.run(step, np.empty((1, VOCAB), np.float32))
    assert len(device.uploads) == len(weights.arrays) + len(states)
    # The host's arrays are let go: a checkpoint's pages need not stay in memory.
    assert backend._weights == {}


def test_states_are_updated_in_place_on_the_device(engine: Path, weights: ToyWeights, device: Device) -> None:
    states = list(state_tensors(toy_manifest(), 1))
    backend = OrtBackend(engine / "model.onnx", weights.arrays, states, CUDA)
    (binding,) = device.bindings
    held = backend._buffers[0]
    for state in states:
        assert binding._bound_outputs[state.output].data_ptr() == held[state.name].data_ptr()


def test_bfloat16_arrays_reach_the_device_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    module, device = working_module()
    install(monkeypatch, module)
    array = np.linspace(-3, 3, 24, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(4, 6)
    value = OrtValues("cuda").resident(array)
    assert (value.data_type(), value.shape()) == ("tensor(bfloat16)", [4, 6])
    held = (ctypes.c_uint16 * array.size).from_address(value.data_ptr())
    np.testing.assert_array_equal(np.ctypeslib.as_array(held), array.view(np.uint16).ravel())
    assert device.uploads == []


def test_a_device_without_room_is_an_engine_error(
    engine: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = working_module()
    install(monkeypatch, module)

    def fail(_array: Any, device_type: str = "cpu", _device_id: int = 0) -> Any:
        raise RuntimeError(
            f"Available memory of {device_type} is smaller than requested bytes of 4096\n stack"
        )

    monkeypatch.setattr(module.OrtValue, "ortvalue_from_numpy", fail)
    with pytest.raises(
        EngineError, match=r"cannot place the weights and [\d,]+ bytes of state on cuda: Available .* 4096$"
    ):
        Session(engine, weights, options=CUDA)


def test_a_graph_is_built_by_opening_it_on_the_provider(tmp_path: Path, device: Device) -> None:
    graph = write_graph(tmp_path / "graph")
    on_cuda = build_engine(graph, tmp_path / "cuda", options=CUDA)
    assert [name for name, _ in device.sessions[0]["providers"][:1]] == ["CUDAExecutionProvider"]
    assert on_cuda.tools["onnxruntime"] == "1.31.1"
    assert on_cuda.max_seq_len == CAPACITY
    on_cpu = build_engine(graph, tmp_path / "cpu")
    assert on_cpu == on_cuda


@pytest.mark.usefixtures("device")
def test_bfloat16_is_refused_on_the_cpu_only(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", dtype="bfloat16")
    with pytest.raises(EngineError, match="no CPU kernels"):
        build_engine(graph, tmp_path / "cpu")
    assert build_engine(graph, tmp_path / "cuda", options=CUDA).dtype == "bfloat16"


def test_a_build_without_gpu_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = working_module()
    install(monkeypatch, module, gpus=(), driver=None)
    graph = write_graph(tmp_path / "graph")
    with pytest.raises(EngineError, match="no NVIDIA GPU with a working driver"):
        build_engine(graph, tmp_path / "engine", options=CUDA)
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
