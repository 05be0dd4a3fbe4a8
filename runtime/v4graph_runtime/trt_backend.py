"""The plan in TensorRT: weights and states stay on the GPU, inputs and logits are copied per call."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError
from v4graph.manifest import Manifest, Profile
from v4graph.trt import Choice, TensorRT
from v4graph_runtime import trt_checks
from v4graph_runtime.device import LOWER, Device
from v4graph_runtime.plugin_host import PluginHost
from v4graph_runtime.state import Array, StateTensor, state_tensors
from v4graph_runtime.trt_engine import PLAN, TrtEngine
from v4graph_runtime.trt_lane import Bound, Lane, LaneOptions

CALL_INPUTS = ("input_ids", "start_pos", "num_tokens")


@dataclass(frozen=True)
class TrtOptions:
    """How TensorRT runs.

    Attributes:
        device: Index of the GPU among those visible.
        cuda_graph: Replay one-token steps as a CUDA graph.
        runtime_cache: Keep compiled kernels in runtime.cache beside the plan (TensorRT for RTX).
        tensorrt: Which TensorRT; auto takes the one that built the plan, and no other can run it.
    """

    device: int = 0
    cuda_graph: bool = True
    runtime_cache: bool = True
    tensorrt: Choice = "auto"


@dataclass(frozen=True)
class Loadable:
    """A plan that has passed every check, and what will run it; nothing has touched the GPU yet."""

    directory: Path
    manifest: Manifest
    profiles: tuple[Profile, ...]
    batch: int
    options: TrtOptions
    tensorrt: TensorRT
    host: PluginHost | None
    machine: trt_checks.Machine

    @property
    def max_tokens(self) -> int:
        """The most tokens per slot that one run takes."""
        return max(profile.tokens[2] for profile in self.profiles)

    def open(self, weights: Iterable[tuple[str, Array]]) -> TrtBackend:
        """Load the plan and the weights on the GPU.

        Raises:
            EngineError: TensorRT refuses the plan, or the GPU's memory is too small.
        """
        return TrtBackend(self, weights)


def prepare(directory: Path, manifest: Manifest, batch: int, options: TrtOptions) -> Loadable:
    """Check an engine and this machine, files first and TensorRT last.

    Raises:
        EngineError: the engine was changed, or this machine cannot run it; names what to do.
        SessionError: a batch or a GPU index that does not exist.
    """
    record = trt_checks.record_of(directory, manifest)
    trt_checks.check_files(directory, manifest)
    trt_checks.check_batch(record, batch)
    machine = trt_checks.this_machine()
    trt_checks.check_plugins(directory, record, machine.host)
    trt_checks.check_gpu(directory, record, machine, options.device)
    trt_checks.check_kernels(directory, manifest, machine, options.device)
    tensorrt = trt_checks.load_tensorrt(directory, record, machine, options.tensorrt)
    host = machine.host if record.plugins else None
    return Loadable(directory, manifest, record.profiles, batch, options, tensorrt, host, machine)


class TrtBackend:
    """One plan with its weights and the states of a batch, all on one GPU.

    A run takes the first profile that holds its tokens. One-token steps have a lane of their own, whose
    second run is captured as a CUDA graph.
    """

    # A captured graph has its shapes and addresses: a range of slots would need lanes of its own.
    slot_ranges = False
    movable_states = True

    def __init__(self, loadable: Loadable, weights: Iterable[tuple[str, Array]]) -> None:
        """Load everything that stays for the session's life; `weights` are taken one at a time.

        Raises:
            EngineError: TensorRT refuses the plan, a weight is not the manifest's, or memory runs out.
        """
        self._loadable, self._lanes = loadable, dict[LaneOptions, Lane]()
        undo = contextlib.ExitStack()
        # Frees the GPU when the session is forgotten too, and before the driver goes at exit.
        self._release = weakref.finalize(self, undo.close)
        try:
            self._device = loadable.machine.open_device(loadable.options.device)
            undo.callback(self._device.close)
            self._engine = self._load(loadable, self._device)
            undo.callback(self._engine.close)
            undo.callback(_close_lanes, self._lanes)
            # First of all: a forgotten session may be freed in another thread.
            undo.callback(self._device.activate)
            self._place(weights)
            # Whether TensorRT makes contexts at all is better known now than at the first token.
            self._lane(1)
        except BaseException:
            self._release()
            raise

    def run(self, inputs: Mapping[str, Array], logits: npt.NDArray[np.float32], _first: int = 0) -> None:
        """Run the plan once on input_ids, start_pos and num_tokens; `logits` receives its output.

        Raises:
            EngineError: TensorRT, a plugin or the GPU failed; the states are then undefined.
        """
        self._device.activate()
        lane = self._lane(inputs["input_ids"].shape[1])
        first = not lane.runs
        lane.run(inputs, logits)
        if first:
            # The first run is when kernels are compiled; a process that is killed later keeps them.
            self._engine.save_cache()

    def read_state(self, name: str, slot: int, rows: range) -> Array:
        """Return some rows of a slot, [len(rows), width].

        Raises:
            EngineError: the GPU failed.
        """
        self._device.activate()
        state = self._states[name]
        array = np.empty((len(rows), state.shape[2]), state.dtype)
        self._device.download(array, self._row_address(state, slot, rows))
        self._device.synchronize()
        return array

    def write_state(self, name: str, slot: int, rows: range, array: Array) -> None:
        """Replace some rows of a slot by `array` [len(rows), width].

        Raises:
            EngineError: the GPU failed.
        """
        self._device.activate()
        address = self._row_address(self._states[name], slot, rows)
        self._device.upload(address, np.ascontiguousarray(array))
        # A call that follows may free a buffer, and expects a stream with nothing to do.
        self._device.synchronize()

    def _row_address(self, state: StateTensor, slot: int, rows: range) -> int:
        """Return where the first of some rows lies: [batch, rows, width] without gaps."""
        _, height, width = state.shape
        offset = (slot * height + rows.start) * width * np.dtype(state.dtype).itemsize
        return self._bound[state.name].address + offset

    def close(self) -> None:
        """Free the GPU; the backend cannot be used afterwards."""
        self._release()

    def _place(self, weights: Iterable[tuple[str, Array]]) -> None:
        """Fill the GPU's memory with all that stays."""
        manifest, device = self._loadable.manifest, self._device
        states = tuple(state_tensors(manifest, self._loadable.batch))
        self._check_names(states)
        self.state_bytes = sum(state.nbytes for state in states)
        self._states = {state.name: state for state in states}
        scratch = self._engine.scratch_bytes
        _check_memory(device, _weight_bytes(manifest), self.state_bytes, scratch)
        self._bound = dict(_place_states(device, states))
        self._scratch = Bound(device.allocate(scratch, "the engine's scratch memory"), (scratch,))
        self._bound |= _place_weights(device, manifest, weights)
        self._check_bound()

    def _load(self, loadable: Loadable, device: Device) -> TrtEngine:
        device.activate()
        host = loadable.host
        if host is not None:
            host.register(loadable.tensorrt.module)
            gpu = loadable.machine.gpus[loadable.options.device].target
            kernels = trt_checks.kernels_of(loadable.directory)
            host.use_launcher(loadable.manifest.dtype, gpu, kernels)
            host.findings.take()
        return TrtEngine(
            loadable.directory,
            loadable.tensorrt,
            findings=host.findings if host is not None else None,
            runtime_cache=loadable.options.runtime_cache,
        )

    def _lane(self, tokens: int) -> Lane:
        options = self._lane_options(tokens)
        if options not in self._lanes:
            self._lanes[options] = Lane(self._engine, self._device, self._bound, self._scratch, options)
        return self._lanes[options]

    def _lane_options(self, tokens: int) -> LaneOptions:
        host = self._loadable.host
        capturable = self._loadable.options.cuda_graph and (host is None or host.capturable)
        for index, profile in enumerate(self._loadable.profiles):
            if profile.tokens[2] >= tokens:
                return LaneOptions(index, capture=capturable and tokens == 1)
        raise EngineError(
            f"{self._loadable.directory}: {tokens} tokens in one run, its profiles hold "
            f"{self._loadable.max_tokens}; run them in pieces or build with --max-input-len {tokens}."
        )

    def _check_names(self, states: tuple[StateTensor, ...]) -> None:
        """Check that the plan has the manifest's inputs and outputs, before any weight is uploaded."""
        manifest = self._loadable.manifest
        weights = (name for binding in manifest.bindings for name, _ in binding.inputs())
        expected = dict.fromkeys((*CALL_INPUTS, *(state.name for state in states)), True)
        expected |= {} if manifest.embedded_weights else dict.fromkeys(weights, True)
        expected |= dict.fromkeys(("logits", *(state.output for state in states)), False)
        found, path = self._engine.tensors(), self._loadable.directory / PLAN
        for name, is_input in sorted(expected.items() ^ found.items()):
            kind = "input" if is_input else "output"
            have, lack = ("the plan", "the manifest") if name in found else ("the manifest", "the plan")
            raise EngineError(f"{path}: {have} has {kind} '{name}', {lack} has not; build it again.")

    def _check_bound(self) -> None:
        for name, is_input in self._engine.tensors().items():
            if is_input and name not in self._bound and name not in CALL_INPUTS:
                raise EngineError(f"the checkpoint gives no array for weight input '{name}'; check it.")


def _close_lanes(lanes: dict[LaneOptions, Lane]) -> None:
    for lane in lanes.values():
        lane.close()
    lanes.clear()


def _weight_bytes(manifest: Manifest) -> int:
    if manifest.embedded_weights:
        return 0
    return sum(
        math.prod(binding.shape) * np.dtype(binding.dtype).itemsize
        for binding in manifest.bindings
        for _ in binding.inputs()
    )


def _check_memory(device: Device, weights: int, states: int, scratch: int) -> None:
    """Refuse what does not fit before minutes of uploading."""
    needed, free = weights + states + scratch, device.free_bytes()
    if needed > free:
        raise EngineError(
            f"the GPU has {free:,} bytes free, the session takes {needed:,} (weights {weights:,}, states "
            f"{states:,}, scratch {scratch:,}); {LOWER}."
        )


def _place_states(device: Device, states: tuple[StateTensor, ...]) -> Iterable[tuple[str, Bound]]:
    """Allocate zeroed states; a state's next value has the address of the state, which plugins update."""
    for state in states:
        address = device.allocate(state.nbytes, f"state '{state.name}'")
        device.zero(address, state.nbytes)
        yield state.name, Bound(address, state.shape)
        yield state.output, Bound(address, None)


def _place_weights(
    device: Device, manifest: Manifest, weights: Iterable[tuple[str, Array]]
) -> dict[str, Bound]:
    """Upload weights one at a time, so that the host never holds more than one of them."""
    inputs = {name: binding for binding in manifest.bindings for name, _ in binding.inputs()}
    placed: dict[str, Bound] = {}
    for name, array in weights:
        binding = inputs.get(name)
        if binding is None or (array.shape, array.dtype.name) != (binding.shape, binding.dtype):
            expected = f"{binding.dtype} {list(binding.shape)}" if binding else "no such input"
            raise EngineError(
                f"weight '{name}' is {array.dtype.name} {list(array.shape)}, the engine takes {expected}; "
                "give the checkpoint that the graph was exported for."
            )
        address = device.allocate(array.nbytes, f"weight '{name}'")
        device.upload(address, np.ascontiguousarray(array))
        placed[name] = Bound(address, None)
        # Or this one would still be held while the next is made: experts are gigabytes.
        del array
    device.synchronize()
    return placed
