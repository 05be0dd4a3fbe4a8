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
from v4graph.ort import BFLOAT16, DEVICE, Provider, first_line, host_value, load, open_session
from v4graph_runtime import cpu_kernels
from v4graph_runtime.function_names import function_names
from v4graph_runtime.state import Array, StateTensor

# Folded constants above this stay in the graph: folding would turn embedded FP8 and FP4 weights
# into fp32 copies at load (4 to 8 times the bytes).
FOLD_LIMIT = 1 << 20


@dataclass(frozen=True)
class OrtOptions:
    """How onnxruntime runs.

    Attributes:
        provider: "cpu", or "cuda" with onnxruntime-gpu on an NVIDIA GPU, the first that is visible.
        threads: Threads per op on the CPU, 0 for one per core.
        in_place: Bind each state's buffer as input and output at once. False keeps two buffers per
            state and swaps them, for comparison.
        spinning: Let onnxruntime's idle threads spin between ops; only pays on a machine with nothing
            else to do.
        kernels: Use the native CPU kernels of the custom ops, if they are built, instead of function bodies.
    """

    provider: Provider = "cpu"
    threads: int = 0
    in_place: bool = True
    spinning: bool = False
    kernels: bool = True


def open_model(path: Path, options: OrtOptions) -> Any:
    """Open model.onnx as an onnxruntime.InferenceSession.

    Raises:
        EngineError: onnxruntime is not installed, cannot load the graph, or cannot run on CUDA.
    """
    module = load(options.provider)
    settings = module.SessionOptions()
    settings.log_severity_level = 3
    # Not 0: onnxruntime would then pin its threads to cores, and wait whenever another process has one.
    threads = options.threads or available_cores()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    settings.add_session_config_entry(
        "optimization.constant_folding_max_output_size_in_bytes", str(FOLD_LIMIT)
    )
    if options.provider == "cpu" and options.kernels and path.is_file():
        # A registered kernel comes before the function of its name.
        cpu_kernels.register(settings, function_names(path), threads)
    return open_session(module, path, settings, options.provider)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def as_bindable(array: Array) -> Array:
    """Return the array itself if onnxruntime can read its memory, else a contiguous aligned copy."""
    return np.require(array, requirements=("C_CONTIGUOUS", "ALIGNED"))


class OrtValues:
    """numpy arrays to OrtValues where a provider computes."""

    def __init__(self, provider: Provider) -> None:
        self._module = load(provider)
        self._device = "cuda" if provider == "cuda" else "cpu"

    def host(self, array: Array) -> Any:
        """Return a value on the array's own memory, which the caller keeps alive."""
        return host_value(self._module, array)

    def resident(self, array: Array) -> Any:
        """Return a value that stays for the session's life: on the CPU the array itself, on CUDA a copy."""
        if self._device == "cpu":
            return self.host(array)
        if array.dtype.name == "bfloat16":
            value = self._module.OrtValue.ortvalue_from_shape_and_type(
                list(array.shape), BFLOAT16, self._device, DEVICE
            )
            value.update_inplace(array.view(np.uint16))
            return value
        return self._module.OrtValue.ortvalue_from_numpy(array, self._device, DEVICE)


class OrtBackend:
    """One open graph with its weights and the states of a batch.

    On the CPU weights are bound by pointer: a memory-mapped array stays in the page cache. Those arrays
    are kept alive here because an OrtValue does not own numpy's memory. On CUDA each is copied once.
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
            EngineError: onnxruntime cannot load the graph, an input of it has no value, or the GPU's memory
                does not hold weights and states.
        """
        self._on_cuda = options.provider == "cuda"
        self._session = open_model(path, options)
        self._values = OrtValues(options.provider)
        states = tuple(states)
        known = {"input_ids", "start_pos", "num_tokens", *weights} | {state.name for state in states}
        self._check_inputs(path, known)
        self.state_bytes = sum(state.nbytes for state in states) * (1 if options.in_place else 2)
        self._weights = {name: as_bindable(array) for name, array in weights.items()}
        try:
            self._buffers = self._allocate(states, options)
            self._bindings = self._bind(states)
        except Exception as error:  # see v4graph.ort.open_session
            raise EngineError(
                f"{path}: onnxruntime cannot place the weights and {self.state_bytes:,} bytes of state on "
                f"{options.provider}: {first_line(error)}"
            ) from error
        if self._on_cuda:
            self._weights.clear()

    def _check_inputs(self, path: Path, known: set[str]) -> None:
        wanted = {value.name for value in self._session.get_inputs()}
        for name in sorted(wanted - known):
            raise EngineError(
                f"{path}: graph input '{name}' is neither a state nor a weight of the manifest; "
                "export it again."
            )
        for name in sorted(known - wanted):
            raise EngineError(
                f"{path}: the manifest names input '{name}', which the graph does not have; export it again."
            )

    def _allocate(self, states: tuple[StateTensor, ...], options: OrtOptions) -> list[dict[str, Any]]:
        """Return the states' values to use in turn: one set in place, two that are swapped otherwise."""
        return [
            {state.name: self._values.resident(state.allocate()) for state in states}
            for _ in range(1 if options.in_place else 2)
        ]

    def _bind(self, states: tuple[StateTensor, ...]) -> list[Any]:
        """Return a binding per set of state values; the next values go to the other set, if there is one."""
        weights = {name: self._values.resident(array) for name, array in self._weights.items()}
        bindings = []
        for turn, held in enumerate(self._buffers):
            binding = self._session.io_binding()
            for name, value in {**weights, **held}.items():
                binding.bind_ortvalue_input(name, value)
            for state in states:
                binding.bind_ortvalue_output(state.output, self._buffers[turn - 1][state.name])
            bindings.append(binding)
        return bindings

    def run(self, inputs: Mapping[str, Array], logits: npt.NDArray[np.float32]) -> None:
        """Run the graph once on input_ids, start_pos and num_tokens; `logits` receives its output.

        Raises:
            EngineError: onnxruntime failed; the states of slots with new tokens are then undefined.
        """
        binding = self._bindings[0]
        try:
            if self._on_cuda:
                # Where a state's first reader has no CUDA kernel, it is binding that copies it to the CPU.
                for name, value in self._buffers[0].items():
                    binding.bind_ortvalue_input(name, value)
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, self._values.host(array))
            binding.bind_ortvalue_output("logits", self._values.host(logits))
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:  # see v4graph.ort.open_session
            raise EngineError(f"onnxruntime failed while running the graph: {first_line(error)}") from error
        self._bindings.reverse()
        self._buffers.reverse()
