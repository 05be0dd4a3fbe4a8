"""A graph with embedded weights gives the same logits in onnxruntime alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from engines import export_and_build

from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import pack
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_runtime import Session

IDS = np.arange(20)[None] % 40


def make(folder: Path) -> Path:
    """Write a tiny random checkpoint in the official format."""
    init(tiny.config(), folder / "checkpoint", seed=1)
    return folder / "checkpoint"


def run_alone(graph: Path) -> np.ndarray:
    """Prefill in an onnxruntime session that knows only model.onnx."""
    session = onnxruntime.InferenceSession(str(graph / "model.onnx"), providers=["CPUExecutionProvider"])
    sizes = {"B": 1, "C4": 128, "C128": 4}
    feed = {
        value.name: np.zeros([sizes.get(dim, dim) for dim in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("state.")
    }
    feed |= {"input_ids": IDS, "start_pos": np.zeros(1, np.int32), "num_tokens": np.full(1, 20, np.int32)}
    return session.run(["logits"], feed)[0]


@pytest.mark.parametrize("packed", [False, True], ids=["original", "packed"])
def test_embedded_weights_give_the_logits_of_bound_ones(tmp_path: Path, packed: bool) -> None:
    checkpoint = make(tmp_path)
    engine = export_and_build(tmp_path, checkpoint, ExportOptions(max_seq_len=512))
    expected = Session(engine, checkpoint).prefill(IDS)
    source = checkpoint
    if packed:
        source = tmp_path / "packed"
        pack(checkpoint, source)
    graph = tmp_path / "embedded"
    export_graph(resolve(str(source)), graph, ExportOptions(max_seq_len=512, embed_weights=True))
    np.testing.assert_allclose(run_alone(graph), expected, rtol=1e-5, atol=1e-5)
