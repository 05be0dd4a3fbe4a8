"""One execution context of one optimization profile, with the buffers of its inputs and logits.

Contexts that serve different shapes are kept apart: a captured CUDA graph needs its context, its
addresses and its shapes to stay as they were.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError
from v4graph_runtime.device import Device
from v4graph_runtime.state import Array
from v4graph_runtime.trt_engine import TrtEngine

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bound:
    """What stays in place for a session's life: a tensor's address, and its shape if it is an input."""

    address: int
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class LaneOptions:
    """Which profile a lane runs, and whether it captures: then all its calls have the same shapes."""

    profile: int
    capture: bool


class Lane:
    """Runs calls one after the other; weights and states are shared with the other lanes."""

    def __init__(
        self,
        engine: TrtEngine,
        device: Device,
        bound: Mapping[str, Bound],
        scratch: Bound,
        options: LaneOptions,
    ) -> None:
        """Make the context and set every address that stays; `scratch` is shared by all lanes.

        Raises:
            EngineError: TensorRT refuses the profile, an address or a shape.
        """
        self._engine, self._device, self._options = engine, device, options
        self._capture = options.capture
        self._graph: Any = None
        self._sizes: dict[str, int] = {}
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.runs = 0
        self._context = engine.context(fixed_shapes=options.capture)
        try:
            self._set_up(bound, scratch)
        except BaseException:
            # The error's traceback would keep the context alive longer than the engine.
            self.close()
            raise

    def run(self, inputs: Mapping[str, Array], logits: npt.NDArray[np.float32]) -> None:
        """Copy the inputs in, run, and copy the logits out; returns when all is done.

        Raises:
            EngineError: TensorRT, a plugin or the GPU failed.
        """
        # Before the copies: a buffer that grows is freed, and the stream has nothing to do yet.
        for name, array in (*inputs.items(), ("logits", logits)):
            self._reserve(name, array.nbytes)
        for name, array in inputs.items():
            self._set_shape(name, array.shape)
            self._device.upload(self._addresses[name], array)
        # The first run is never captured: TensorRT settles its memory and compiles kernels in it.
        if self._capture and self.runs and self._graph is None:
            self._graph = self._captured()
        if self._graph is not None:
            self._device.launch(self._graph)
        else:
            self._enqueue()
        self._device.download(logits, self._addresses["logits"])
        self._device.synchronize()
        self.runs += 1

    def close(self) -> None:
        """Drop the graph and the context; nothing may be running."""
        if self._graph is not None:
            self._device.release(self._graph)
        self._graph = self._context = None

    def _set_up(self, bound: Mapping[str, Bound], scratch: Bound) -> None:
        profile = self._options.profile
        if not self._context.set_optimization_profile_async(profile, self._device.stream):
            raise self._engine.failure(f"TensorRT refuses optimization profile {profile}")
        self._device.synchronize()
        self._context.set_device_memory(scratch.address, math.prod(scratch.shape or ()))
        for name, tensor in bound.items():
            self._set_address(name, tensor.address)
            if tensor.shape is not None:
                self._set_shape(name, tensor.shape)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise self._engine.failure("TensorRT failed while running the engine")

    def _captured(self) -> Any:
        """Return the CUDA graph of one run, or None, and do not try again, if there cannot be one."""
        self._capture = False
        stream = self._device.stream
        asked = hasattr(self._context, "is_stream_capturable")
        if asked and not self._context.is_stream_capturable(stream):
            logger.warning("decoding without a CUDA graph: TensorRT says that this engine cannot be captured")
            return None
        try:
            return self._device.capture(self._enqueue)
        except EngineError as error:
            logger.warning("decoding without a CUDA graph: %s", error)
            return None

    def _reserve(self, name: str, nbytes: int) -> None:
        """Make a buffer large enough for a tensor of this call."""
        if self._sizes.get(name, -1) >= nbytes:
            return
        old = self._addresses.pop(name, None)
        if old is not None:
            del self._sizes[name]
            self._device.free(old)
        self._addresses[name] = self._device.allocate(nbytes, f"the {name} of one call")
        self._sizes[name] = nbytes
        self._set_address(name, self._addresses[name])

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._engine.failure(f"TensorRT refuses an address for '{name}'")

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) == shape:
            return
        if not self._context.set_input_shape(name, shape):
            raise self._engine.failure(
                f"TensorRT refuses shape {list(shape)} for '{name}' in optimization profile "
                f"{self._options.profile}"
            )
        self._shapes[name] = shape
