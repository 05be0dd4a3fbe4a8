"""Nano on this machine's GPU without TensorRT: its whole lowered graph through the plugins' enqueue.

Against onnxruntime's float32 session, as tests/kernels/test_nano_on_emulated_kernels.py does on the emulator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from engines import NANO
from gpu_graph import GpuGraph, Values
from graphs import export_nano
from nano_schedules import (
    CAPACITY,
    DECODE,
    Ids,
    Int32,
    Logits,
    at_once,
    check,
    float32_logits,
    held_out,
    in_ragged_pieces,
    step_by_step,
)

from v4graph.checkpoint import Checkpoint
from v4graph.gpu import gpus
from v4graph.manifest import Manifest
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.host import Host
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.lowering import lower
from v4graph_runtime.state import state_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not gpus(), reason="no NVIDIA GPU with a working driver (v4graph.gpu.gpus() is empty)"
    ),
]


class NanoOnGpu:
    """v4 numerics, bf16, all logits, two slots."""

    def __init__(self, graph_dir: Path) -> None:
        torch.zeros(1, device="cuda")  # makes the context current
        found = Host().kernels(gpus()[0].target)
        assert found is not None, "compile the kernels first: v4graph kernels build"
        manifest = Manifest.load(graph_dir)
        lowered = lower(graph_dir / "model.onnx", manifest, ("portable",), ())
        self.graph = GpuGraph(lowered.onnx, KernelLauncher(CudaDriver(*found)))
        weights = {name: _on_gpu(array) for name, array in Checkpoint.open(NANO).bound(manifest)}
        self.states = {s.name: _on_gpu(s.allocate()) for s in state_tensors(manifest, 2)}
        self.feeds: Values = {**weights, **self.states}

    def run(self, ids: Ids, start: Int32, num: Int32) -> Logits:
        """Return logits [2, S, V]."""
        step = {"input_ids": ids, "start_pos": start.astype(np.int32), "num_tokens": num.astype(np.int32)}
        feeds = {**self.feeds, **{name: _on_gpu(array) for name, array in step.items()}}
        logits: Logits = self.graph.run(feeds)["logits"].cpu().numpy()
        return logits

    def decode_captured(self, ids: Ids) -> Logits:
        """Decode ids [2, S] one by one by replaying one CUDA graph."""
        step = {
            "input_ids": _on_gpu(ids[:, :1]),
            "start_pos": torch.zeros(2, dtype=torch.int32, device="cuda"),
            "num_tokens": torch.ones(2, dtype=torch.int32, device="cuda"),
        }
        replay, outputs = self.graph.capture({**self.feeds, **step})
        found = []
        for at in range(ids.shape[1]):
            step["input_ids"].copy_(torch.from_numpy(ids[:, at : at + 1]))
            step["start_pos"].fill_(at)
            replay()
            found.append(outputs["logits"].cpu().numpy())
        return np.concatenate(found, 1)


def _on_gpu(array: npt.NDArray[np.generic]) -> torch.Tensor:
    dense = np.array(array, order="C")
    if dense.dtype.name == "bfloat16":
        return torch.from_numpy(dense.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(dense).cuda()


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
    captured = NanoOnGpu(graph_dir).decode_captured(texts[:, :DECODE])
    check(captured, float32[:, :DECODE])
    assert np.array_equal(step_by_step(NanoOnGpu(graph_dir), texts[:, :DECODE]), captured)


def test_prefill_at_once_matches_onnxruntime(graph_dir: Path, texts: Ids, float32: Logits) -> None:
    check(at_once(NanoOnGpu(graph_dir), texts), float32)


def test_any_schedule_matches_onnxruntime(graph_dir: Path, texts: Ids, float32: Logits) -> None:
    check(in_ragged_pieces(NanoOnGpu(graph_dir), texts, float32.shape[-1]), float32)
