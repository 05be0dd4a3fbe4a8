"""The graph in onnxruntime: weights and states bound once, inputs and logits bound per call."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
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
# Bindings of ranges of slots that are kept: making one takes a call per weight.
RANGES = 64


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
        # With two buffers a run must write all of the other one; on CUDA an OrtValue has no parts.
        self.slot_ranges = options.in_place and not self._on_cuda
        self._session = open_model(path, options)
        self._values = OrtValues(options.provider)
        states = tuple(states)
        known = {"input_ids", "start_pos", "num_tokens", *weights} | {state.name for state in states}
        self._check_inputs(path, known)
        # onnxruntime hands no bfloat16 tensor of a GPU to numpy.
        self.movable_states = not (self._on_cuda and any(state.dtype == "bfloat16" for state in states))
        self._outputs = {state.name: state.output for state in states}
        self._batch = states[0].shape[0] if states else 1
        self.state_bytes = sum(state.nbytes for state in states) * (1 if options.in_place else 2)
        self._weights = {name: as_bindable(array) for name, array in weights.items()}
        try:
            self._place(states, 1 if options.in_place else 2)
        except Exception as error:  # see v4graph.ort.open_session
            raise EngineError(
                f"{path}: onnxruntime cannot place the weights and {self.state_bytes:,} bytes of state on "
                f"{options.provider}: {first_line(error)}"
            ) from error
        self._ranges: OrderedDict[range, Any] = OrderedDict()
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

    def _place(self, states: tuple[StateTensor, ...], sets: int) -> None:
        """Make the states' values to use in turn, one set in place or two that are swapped, and bind them."""
        arrays = [{state.name: state.allocate() for state in states} for _ in range(sets)]
        self._buffers = [
            {name: self._values.resident(array) for name, array in held.items()} for held in arrays
        ]
        # The states themselves; on CUDA what was copied is let go.
        self._arrays = [] if self._on_cuda else arrays
        self._resident = {name: self._values.resident(array) for name, array in self._weights.items()}
        self._bindings = [
            self._binding(held, self._buffers[turn - 1]) for turn, held in enumerate(self._buffers)
        ]

    def _binding(self, held: Mapping[str, Any], following: Mapping[str, Any]) -> Any:
        """Return a binding of the weights, of state values and of those that take their next values."""
        binding = self._session.io_binding()
        for name, value in {**self._resident, **held}.items():
            binding.bind_ortvalue_input(name, value)
        for name, output in self._outputs.items():
            binding.bind_ortvalue_output(output, following[name])
        return binding

    def run(self, inputs: Mapping[str, Array], logits: npt.NDArray[np.float32], first: int = 0) -> None:
        """Run the graph once on input_ids, start_pos and num_tokens; `logits` receives its output.

        Their rows are all slots or, with `slot_ranges`, those from `first` on.

        Raises:
            EngineError: onnxruntime failed; the states of slots with new tokens are then undefined.
        """
        try:
            binding = self._binding_of(range(first, first + len(logits)))
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
        for turns in (self._bindings, self._buffers, self._arrays):
            turns.reverse()

    def _binding_of(self, slots: range) -> Any:
        """Return the binding of all slots, or of the part of each buffer that holds some of them."""
        if len(slots) == self._batch:
            return self._bindings[0]
        binding = self._ranges.pop(slots, None)
        if binding is None:
            rows = slice(slots.start, slots.stop)
            parts = {name: self._values.host(array[rows]) for name, array in self._arrays[0].items()}
            binding = self._binding(parts, parts)
        # The last used is the last to go.
        self._ranges[slots] = binding
        if len(self._ranges) > RANGES:
            self._ranges.popitem(last=False)
        return binding

    def read_state(self, name: str, slot: int, rows: range) -> Array:
        """Return a copy of some rows of a slot, [len(rows), width]; on CUDA by way of the whole tensor."""
        held = self._buffers[0][name].numpy() if self._on_cuda else self._arrays[0][name]
        return np.array(held[slot, rows.start : rows.stop])

    def write_state(self, name: str, slot: int, rows: range, array: Array) -> None:
        """Replace some rows of a slot by `array` [len(rows), width]."""
        held = self._buffers[0][name].numpy() if self._on_cuda else self._arrays[0][name]
        held[slot, rows.start : rows.stop] = array
        if self._on_cuda:
            self._buffers[0][name].update_inplace(held)
