"""A checkpoint's lowered bf16 graph, weights and states on the GPU, driven by the plugins' enqueue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gpu_graph import GpuGraph, Values
from nano_schedules import Ids, Int32, Logits

from v4graph.checkpoint import Checkpoint
from v4graph.gpu import gpus
from v4graph.manifest import Manifest
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.host import Host
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.launcher import Launcher
from v4graph_plugins.lowering import lower
from v4graph_runtime.state import state_tensors

SLOTS = 2


def gpu_launcher() -> Launcher:
    """Return the launcher of the first GPU's kernels."""
    torch.zeros(1, device="cuda")  # makes the context current
    found = Host().kernels(gpus()[0].target)
    assert found is not None, "compile the kernels first: v4graph kernels build"
    return KernelLauncher(CudaDriver(*found))


class GpuModel:
    """All logits, two slots. Another launcher runs it elsewhere: `device` "cpu" with the emulator's."""

    def __init__(self, graph_dir: Path, checkpoint: Path, launcher: Launcher, device: str = "cuda") -> None:
        manifest = Manifest.load(graph_dir)
        lowered = lower(graph_dir / "model.onnx", manifest, ("portable",), ())
        self.device = device
        self.graph = GpuGraph(lowered.onnx, launcher, device)
        bound = Checkpoint.open(checkpoint).bound(manifest)
        weights = {name: self._place(array) for name, array in bound}
        states = {s.name: self._place(s.allocate()) for s in state_tensors(manifest, SLOTS)}
        self.feeds: Values = {**weights, **states}

    def run(self, ids: Ids, start: Int32, num: Int32) -> Logits:
        """Return logits [2, S, V]."""
        step = {"input_ids": ids, "start_pos": start.astype(np.int32), "num_tokens": num.astype(np.int32)}
        feeds = {**self.feeds, **{name: self._place(array) for name, array in step.items()}}
        logits: Logits = self.graph.run(feeds)["logits"].cpu().numpy()
        return logits

    def decode_captured(self, ids: Ids, start: int = 0) -> Logits:
        """Decode ids [2, S] one by one, behind `start` tokens, by replaying one CUDA graph."""
        step = {
            "input_ids": self._place(ids[:, :1]),
            "start_pos": torch.full((SLOTS,), start, dtype=torch.int32, device=self.device),
            "num_tokens": torch.ones(SLOTS, dtype=torch.int32, device=self.device),
        }
        replay, outputs = self.graph.capture({**self.feeds, **step})
        found = []
        for at in range(ids.shape[1]):
            step["input_ids"].copy_(torch.from_numpy(np.ascontiguousarray(ids[:, at : at + 1])))
            step["start_pos"].fill_(start + at)
            replay()
            found.append(outputs["logits"].cpu().numpy())
        return np.concatenate(found, 1)

    def _place(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        dense = np.array(array, order="C")
        if dense.dtype.name == "bfloat16":
            return torch.from_numpy(dense.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(dense).to(self.device)
