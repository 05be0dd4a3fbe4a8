"""The graph in onnxruntime: weights and states bound once, inputs and logits bound per call."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError
from v4graph_runtime.state import Array, StateTensor

# Folded constants above this stay in the graph: folding would turn embedded FP8 and FP4 weights
# into fp32 copies at load (4 to 8 times the bytes).
FOLD_LIMIT = 1 << 20


@dataclass(frozen=True)
class OrtOptions:
    """How onnxruntime runs.

    Attributes:
        threads: Threads per op, 0 for one per core.
        in_place: Bind each state's buffer as input and output at once. False keeps two buffers per
            state and swaps them, for comparison.
        spinning: Let idle threads spin between ops; only pays on a machine with nothing else to do.
    """

    threads: int = 0
    in_place: bool = True
    spinning: bool = False


def open_model(path: Path, options: OrtOptions) -> Any:
    """Open model.onnx as an onnxruntime.InferenceSession on the CPU.

    Raises:
        EngineError: onnxruntime is not installed, or cannot load the graph.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise EngineError(
            "onnxruntime is not installed; install it with `pip install 'v4graph[ort]'`."
        ) from error
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    # Not 0: onnxruntime would then pin its threads to cores, and wait whenever another process has one.
    settings.intra_op_num_threads = options.threads or available_cores()
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    settings.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(FOLD_LIMIT)
    )
    try:
        return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        raise EngineError(
            f"{path}: onnxruntime {ort.__version__} cannot load it: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; onnxruntime appends stack frames to some."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def as_bindable(array: Array) -> Array:
    """Return the array itself if onnxruntime can read its memory, else a contiguous aligned copy."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))


class OrtBackend:
    """One open graph with its weights and the states of a batch.

    Weights are bound by pointer: a memory-mapped array stays in the page cache. The arrays are kept
    alive here because an OrtValue does not own numpy's memory.
    """

    def __init__(
        self,
        path: Path,
        weights: Mapping[str, Array],
        states: Iterable[StateTensor],
        options: OrtOptions,
    ) -> None:
        """Open the graph and bind everything that stays for the session's life.

        Raises:
            EngineError: onnxruntime cannot load the graph, or an input of it has no value.
        """
        self._session = open_model(path, options)
        self._weights = {name: as_bindable(array) for name, array in weights.items()}
        states = tuple(states)
        self._check_inputs(path, {"input_ids", "start_pos", "num_tokens"} | {state.name for state in states})
        self.state_bytes = sum(state.nbytes for state in states) * (1 if options.in_place else 2)
        self._bindings = self._bind(states, options.in_place)

    def _check_inputs(self, path: Path, known: set[str]) -> None:
        wanted = {value.name for value in self._session.get_inputs()}
        got = known | self._weights.keys()
        for name in sorted(wanted - got):
            raise EngineError(
                f"{path}: graph input '{name}' is neither a state nor a weight of the manifest; "
                "export it again."
            )
        for name in sorted(got - wanted):
            raise EngineError(
                f"{path}: the manifest names input '{name}', which the graph does not have; export it again."
            )

    def _bind(self, states: tuple[StateTensor, ...], in_place: bool) -> list[Any]:
        """Return the bindings to use in turn: one in place, two that swap their buffers otherwise."""
        value = self._value
        weights = {name: value(array) for name, array in self._weights.items()}
        buffers = [{state.name: value(state.allocate()) for state in states} for _ in range(2 - in_place)]
        bindings = []
        for turn in range(len(buffers)):
            binding = self._session.io_binding()
            for name, weight in weights.items():
                binding.bind_ortvalue_input(name, weight)
            for state in states:
                binding.bind_ortvalue_input(state.name, buffers[turn][state.name])
                binding.bind_ortvalue_output(state.output, buffers[turn - 1][state.name])
            bindings.append(binding)
        return bindings

    @staticmethod
    def _value(array: Array) -> Any:
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(array)

    def run(self, inputs: Mapping[str, Array], logits: npt.NDArray[np.float32]) -> None:
        """Run the graph once on input_ids, start_pos and num_tokens; `logits` receives its output.

        Raises:
            EngineError: onnxruntime failed; the states of slots with new tokens are then undefined.
        """
        binding = self._bindings[0]
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._value(array))
        binding.bind_ortvalue_output("logits", self._value(logits))
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # see open_model
            raise EngineError(f"onnxruntime failed while running the graph: {first_line(error)}") from error
        self._bindings.reverse()
