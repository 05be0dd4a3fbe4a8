"""Nano on this machine's GPU without TensorRT: its whole lowered graph through the plugins' enqueue.

Against onnxruntime's float32 session, as tests/kernels/test_nano_on_emulated_kernels.py does on the emulator.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from agreement import agreement
from engines import NANO, export_and_build
from gpu_graph import GpuGraph, Values
from graphs import export_nano

from v4graph.checkpoint import Checkpoint
from v4graph.gpu import gpus
from v4graph.manifest import Manifest
from v4graph_export import ExportOptions
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.host import Host
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.lowering import lower
from v4graph_runtime import Session, Tokenizer
from v4graph_runtime.state import state_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not gpus(), reason="no NVIDIA GPU with a working driver (v4graph.gpu.gpus() is empty)"
    ),
]
CAPACITY, PREFILL, DECODE, DOCUMENT = 512, 300, 150, 3000
# As on the emulator: bf16 itself moves logits, and a coin's toss is left out of the argmax.
MEAN_KL, ARGMAX, DECIDED = 5e-3, 0.98, 0.05
Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class NanoOnGpu:
    """v4 numerics, bf16, all logits, two slots; `replays` steps of one token as a CUDA graph."""

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

    def run(self, ids: Ids, start: npt.NDArray[np.int32], num: npt.NDArray[np.int32]) -> Logits:
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


def check(got: Logits, want: Logits) -> None:
    found = agreement(got, want)
    best = np.sort(want, -1)[..., -2:]
    decided = best[..., 1] - best[..., 0] > DECIDED
    share = float((got.argmax(-1) == want.argmax(-1))[decided].mean())
    print(f"{found}; {share:.2%} of the {decided.mean():.1%} decided by more than {DECIDED}")
    assert found.mean_kl <= MEAN_KL, found
    assert share >= ARGMAX, found


@pytest.fixture(scope="module")
def texts() -> Ids:
    ids = np.asarray(Tokenizer.load(NANO).encode((NANO / "heldout.txt").read_text()))
    return np.stack([ids[:PREFILL], ids[DOCUMENT:][:PREFILL]])


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory, texts: Ids) -> Logits:
    options = ExportOptions(numerics="v4", max_seq_len=CAPACITY, all_logits=True)
    engine = export_and_build(tmp_path_factory.mktemp("nano"), NANO, options)
    logits: Logits = Session(engine, NANO, batch=2).prefill(texts)
    return logits


@pytest.fixture(scope="module")
def graph_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "graph"
    return export_nano(folder, numerics="v4", max_seq_len=CAPACITY, all_logits=True)


def test_decode_as_a_cuda_graph_matches_onnxruntime_and_plain_launches(
    graph_dir: Path, texts: Ids, float32: Logits
) -> None:
    captured = NanoOnGpu(graph_dir).decode_captured(texts[:, :DECODE])
    check(captured, float32[:, :DECODE])
    plain, one = NanoOnGpu(graph_dir), np.ones(2, np.int32)
    steps = [plain.run(texts[:, t : t + 1], t * one, one) for t in range(DECODE)]
    assert np.array_equal(np.concatenate(steps, 1), captured)


def test_prefill_at_once_matches_onnxruntime(graph_dir: Path, texts: Ids, float32: Logits) -> None:
    model = NanoOnGpu(graph_dir)
    check(model.run(texts, np.zeros(2, np.int32), np.full(2, PREFILL, np.int32)), float32)


def test_any_schedule_matches_onnxruntime(graph_dir: Path, texts: Ids, float32: Logits) -> None:
    """Ragged pieces, idle slots, and tokens that turn out wrong: taken back by starting where they began."""
    model, random = NanoOnGpu(graph_dir), np.random.default_rng(3)
    at, got = np.zeros(2, np.int32), np.zeros_like(float32)
    while at.min() < PREFILL:
        length = int(random.choice([1, 5, 40, 60]))
        counts = np.minimum(random.integers(0, length + 1, 2), PREFILL - at).astype(np.int32)
        counts[at.argmin()] = min(length, PREFILL - int(at.min()))
        piece = np.stack([np.resize(texts[b, p : p + length], length) for b, p in enumerate(at % PREFILL)])
        model.run((piece + 1) % 256, at, np.minimum(counts, 4))
        logits = model.run(piece, at, counts)
        for slot, count in enumerate(counts):
            got[slot, at[slot] : at[slot] + count] = logits[slot, :count]
        at = at + counts
    check(got, float32)
