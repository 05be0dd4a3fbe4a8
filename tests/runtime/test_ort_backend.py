import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_engine import VOCAB, WIDTH, ToyWeights, toy_manifest

from v4graph.errors import EngineError
from v4graph_runtime import Session
from v4graph_runtime.ort_backend import OrtBackend, OrtOptions, as_bindable
from v4graph_runtime.state import StateTensor, state_tensors


@pytest.fixture
def states() -> list[StateTensor]:
    return list(state_tensors(toy_manifest(), batch=1))


def mapped(folder: Path, weights: ToyWeights, offset: int = 0) -> dict[str, Any]:
    """The weights as read-only views of a memory-mapped file, at any byte offset."""
    arrays = {}
    for name, array in weights.arrays.items():
        (folder / name).write_bytes(b"\0" * offset + array.tobytes())
        raw = np.memmap(folder / name, np.uint8, mode="r")
        arrays[name] = raw[offset:].view(np.float32).reshape(VOCAB, WIDTH)
    return arrays


def bound_pointers(backend: OrtBackend) -> list[dict[str, int]]:
    return [
        {name: value.data_ptr() for name, value in {**b._bound_inputs, **b._bound_outputs}.items()}
        for b in backend._bindings
    ]


@pytest.mark.parametrize("in_place", [True, False])
def test_mapped_weights_are_bound_by_pointer(
    engine: Path, tmp_path: Path, weights: ToyWeights, states: list[StateTensor], in_place: bool
) -> None:
    arrays = mapped(tmp_path, weights)
    backend = OrtBackend(engine / "model.onnx", arrays, states, OrtOptions(in_place=in_place))
    for pointers in bound_pointers(backend):
        assert all(pointers[name] == array.ctypes.data for name, array in arrays.items())


def test_states_share_a_buffer_in_place_and_swap_two_otherwise(
    engine: Path, weights: ToyWeights, states: list[StateTensor]
) -> None:
    one = OrtBackend(engine / "model.onnx", weights.arrays, states, OrtOptions())
    (pointers,) = bound_pointers(one)
    assert all(pointers[state.name] == pointers[state.output] for state in states)
    two = OrtBackend(engine / "model.onnx", weights.arrays, states, OrtOptions(in_place=False))
    first, second = bound_pointers(two)
    assert all(first[state.name] == second[state.output] for state in states)
    assert all(first[state.output] == second[state.name] != first[state.name] for state in states)
    assert two.state_bytes == 2 * one.state_bytes == 2 * sum(state.nbytes for state in states)


def test_mapped_weights_at_odd_offsets_give_the_same_logits(
    engine: Path, tmp_path: Path, weights: ToyWeights
) -> None:
    odd = ToyWeights(mapped(tmp_path, weights, offset=3))
    assert not odd.arrays["embed.weight"].flags.aligned
    logits = [Session(engine, source).prefill([[3, 1, 4, 1, 5]]) for source in (weights, odd)]
    np.testing.assert_array_equal(*logits)


def test_only_what_onnxruntime_cannot_read_is_copied() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert as_bindable(array) is array
    assert as_bindable(array[:, ::2]).flags.c_contiguous
    array.flags.writeable = False
    assert as_bindable(array) is array


def test_without_onnxruntime_the_extra_is_named(
    engine: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"pip install 'v4graph\[ort\]'"):
        Session(engine, weights)


def test_a_weight_of_another_shape_is_an_engine_error(engine: Path, weights: ToyWeights) -> None:
    bad = ToyWeights({**weights.arrays, "head.weight": np.zeros((VOCAB, WIDTH + 1), np.float32)})
    with pytest.raises(EngineError, match="onnxruntime failed while running the graph"):
        Session(engine, bad).prefill([[1, 2]])
