"""Nano as a session over a lowered bf16 graph whose custom ops run through a launcher on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from engines import NANO
from graphs import export_nano
from plugin_interpreter import Interpreter, settled

from v4graph.checkpoint import Checkpoint
from v4graph.manifest import Manifest
from v4graph_plugins.launcher import Launcher
from v4graph_plugins.lowering import lower
from v4graph_runtime.state import state_tensors


class LoweredNano:
    """v4 numerics, bf16, all logits; `run` takes a chunk for every slot."""

    def __init__(
        self, folder: Path, trt: Any, launcher: Launcher, batch: int = 1, capacity: int = 512
    ) -> None:
        graph = export_nano(folder / "bf16", numerics="v4", max_seq_len=capacity, all_logits=True)
        manifest = Manifest.load(graph)
        lowered = lower(graph / "model.onnx", manifest, ("sm120",), ())
        assert lowered.bodies == ()
        self.plugins = lowered.plugins
        self.interpreter = Interpreter(trt, lowered.onnx, launcher)
        self.weights = {name: settled(array) for name, array in Checkpoint.open(NANO).bound(manifest)}
        self.states = {s.name: settled(s.allocate()) for s in state_tensors(manifest, batch)}

    def run(
        self, ids: npt.NDArray[np.int64], start: npt.NDArray[np.int32], num: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.float32]:
        """Return logits [B, S, V] of ids [B, S] at positions start [B], the first num [B] of each valid."""
        feeds = {
            **self.weights,
            **self.states,
            "input_ids": ids,
            "start_pos": start.astype(np.int32),
            "num_tokens": num.astype(np.int32),
        }
        logits: npt.NDArray[np.float32] = self.interpreter.run(feeds)["logits"]
        return logits
