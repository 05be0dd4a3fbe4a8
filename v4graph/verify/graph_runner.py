"""Run a graph in onnxruntime call by call, with its states in numpy and any of its values shown."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from v4graph import ort
from v4graph.checkpoint import Checkpoint
from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph.verify.random_inputs import Array, widened
from v4graph.verify.twin import float32_twin


class GraphRunner:
    """A batch of sequences in one graph; `step` appends tokens.

    A bf16 graph runs as its float32 twin. `model` must not be changed afterwards.
    """

    def __init__(
        self, model: ir.Model, manifest: Manifest, weights: Mapping[str, Array], batch: int, folder: Path
    ) -> None:
        """Load the graph; `folder` is where its embedded weights lie, if it has any."""
        self.widened = float32_twin(model)
        self.position = np.zeros(batch, np.int64)
        self.weights = {name: widened(array) if self.widened else array for name, array in weights.items()}
        self._states = _states(manifest, batch, self.widened)
        self._session: Any = open_unoptimized(model, folder)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def feeds(self, ids: Array, counts: Sequence[int]) -> dict[str, Array]:
        """Return every input of the next call."""
        return {
            **self.weights,
            **self._states,
            "input_ids": ids,
            "start_pos": self.position.astype(np.int32),
            "num_tokens": np.array(counts, np.int32),
        }

    def step(self, ids: Array, counts: Sequence[int]) -> dict[str, Array]:
        """Append `counts` [B] of the tokens [B, S] and return every output by name.

        Raises:
            EngineError: onnxruntime fails.
        """
        given = fed({name: array for name, array in self.feeds(ids, counts).items() if name in self._inputs})
        try:
            found = dict(zip(self._outputs, self._session.run(self._outputs, given), strict=True))
        except Exception as error:  # onnxruntime's errors share no base
            raise EngineError(f"onnxruntime fails on the graph: {ort.first_line(error)}") from error
        for name in self._states:
            self._states[name] = found["next." + name.removeprefix("state.")]
        self.position += counts
        return found


def _states(manifest: Manifest, batch: int, widened: bool) -> dict[str, Array]:
    states: dict[str, Array] = {}
    for state in manifest.states:
        dtype = "float32" if widened or state.dtype == "float32" else state.dtype
        shape = (batch, state.rows(manifest.max_seq_len), int(state.shape[2]))
        for layer in state.layers:
            states[state.name.replace("{i}", str(layer))] = np.zeros(shape, dtype)
    return states


def fed(inputs: Mapping[str, Array]) -> dict[str, Any]:
    """Return arrays as `InferenceSession.run` takes them, which refuses bf16 ones."""
    module = ort.load()
    return {
        name: ort.host_value(module, np.ascontiguousarray(array)) if array.dtype.name == "bfloat16" else array
        for name, array in inputs.items()
    }


def open_unoptimized(model: ir.Model, folder: Path | None = None) -> Any:
    """Load a model in onnxruntime as it is, no graph optimisations; `folder` may hold its weights."""
    module = ort.load()
    settings = module.SessionOptions()
    settings.graph_optimization_level = module.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    # Beside embedded weights, which onnxruntime looks for next to the model.
    place = folder if folder and any(folder.glob("*.safetensors")) else None
    with tempfile.NamedTemporaryFile(suffix=".onnx", dir=place) as file:
        file.write(ir.to_proto(model).SerializeToString())
        file.flush()
        return ort.open_session(module, Path(file.name), settings, "cpu")


def bound_weights(manifest: Manifest, checkpoint: Checkpoint | None, what: str) -> dict[str, Array]:
    """Return the weight inputs of a graph.

    Raises:
        EngineError: the graph needs a checkpoint and there is none.
    """
    if manifest.embedded_weights:
        return {}
    if checkpoint is None:
        raise EngineError(f"{what}: holds no weights; name their checkpoint with --checkpoint DIR.")
    return dict(checkpoint.bound(manifest))
