"""Nano on this machine's GPU without TensorRT: its whole lowered graph through the plugins' enqueue.

Against onnxruntime's float32 session, as tests/kernels/test_nano_on_emulated_kernels.py does on the emulator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import NANO
from gpu_model import GpuModel, gpu_launcher
from graphs import export_nano
from nano_schedules import (
    CAPACITY,
    DECODE,
    Ids,
    Logits,
    at_once,
    check,
    float32_logits,
    held_out,
    in_ragged_pieces,
    step_by_step,
)

from v4graph.gpu import gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not gpus(), reason="no NVIDIA GPU with a working driver (v4graph.gpu.gpus() is empty)"
    ),
]


def nano(graph_dir: Path) -> GpuModel:
    """v4 numerics, bf16, all logits, two slots."""
    return GpuModel(graph_dir, NANO, gpu_launcher())


@pytest.fixture(scope="module")
def texts() -> Ids:
    return held_out()


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory, texts: Ids) -> Logits:
    return float32_logits(tmp_path_factory.mktemp("nano"), texts)


@pytest.fixture(scope="module")
def graph_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "graph"
    return export_nano(folder, numerics="v4", max_seq_len=CAPACITY, all_logits=True)


def test_decode_as_a_cuda_graph_matches_onnxruntime_and_plain_launches(
    graph_dir: Path, texts: Ids, float32: Logits
) -> None:
    captured = nano(graph_dir).decode_captured(texts[:, :DECODE])
    check(captured, float32[:, :DECODE])
    assert np.array_equal(step_by_step(nano(graph_dir), texts[:, :DECODE]), captured)


def test_prefill_at_once_matches_onnxruntime(graph_dir: Path, texts: Ids, float32: Logits) -> None:
    check(at_once(nano(graph_dir), texts), float32)


def test_any_schedule_matches_onnxruntime(graph_dir: Path, texts: Ids, float32: Logits) -> None:
    check(in_ragged_pieces(nano(graph_dir), texts, float32.shape[-1]), float32)
