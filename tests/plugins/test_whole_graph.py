"""Nano's whole lowered graph through the plugins' enqueue, states in place, against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import NANO
from graphs import export_nano
from plugin_interpreter import Interpreter, settled

from v4graph.checkpoint import Checkpoint
from v4graph.manifest import Manifest
from v4graph.trt import TensorRT
from v4graph_plugins.lowering import lower
from v4graph_runtime import Session, build_engine
from v4graph_runtime.state import state_tensors

IDS = np.array([[3, 77, 505, 9, 1200, 64, 31]])


@pytest.mark.parametrize("numerics", ["exact", "v4"])
def test_prefill_and_decode_equal_onnxruntime(tensorrt: TensorRT, tmp_path: Path, numerics: str) -> None:
    graph = export_nano(tmp_path / "graph", numerics=numerics, dtype="float32", max_seq_len=128)
    manifest = Manifest.load(graph)
    build_engine(graph, tmp_path / "engine")
    session = Session(tmp_path / "engine", NANO)
    lowered = lower(graph / "model.onnx", manifest, ("sm120",), ())
    interpreter = Interpreter(tensorrt.module, lowered.onnx)
    states = {state.name: settled(state.allocate()) for state in state_tensors(manifest, 1)}
    weights = {name: settled(array) for name, array in Checkpoint.open(NANO).bound(manifest)}
    for start, stop in ((0, 5), (5, 6), (6, 7)):
        feeds = {
            **weights,
            **states,
            "input_ids": IDS[:, start:stop],
            "start_pos": np.full(1, start, np.int32),
            "num_tokens": np.full(1, stop - start, np.int32),
        }
        outputs = interpreter.run(feeds)
        want = session.prefill(IDS[:, start:stop])
        np.testing.assert_allclose(outputs["logits"], want, rtol=1e-3, atol=2e-3)
        for state in state_tensors(manifest, 1):
            assert np.shares_memory(outputs[state.output], states[state.name]), state.name
    assert interpreter.calls == {name: 3 * count for name, count in lowered.plugins.items()}
