"""The GPU as the TensorRT backend needs it: memory, copies, one stream and CUDA graphs.

`Device` is the interface, `CudaDevice` implements it over the CUDA driver (cuda-bindings).
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError

Array = npt.NDArray[Any]

# Two of these are pinned: one is filled while the other is on its way to the GPU.
STAGING_BYTES = 16 << 20

# What to do when memory is short.
LOWER = (
    "open the session with a smaller batch, build the engine with a smaller --max-seq-len, --max-input-len "
    "or --max-batch-size, or end other processes on this GPU (`nvidia-smi` lists them)"
)
_FIXES = {
    "CUDA_ERROR_ILLEGAL_ADDRESS": "a kernel read or wrote outside its buffers; this process cannot use the "
    "GPU any more, so start it again, and report it if it comes back",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver's library and its kernel module differ; reboot",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has the GPU for itself; see `nvidia-smi`",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "the kernels were not compiled for this GPU; build for its target",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the driver is older than the kernels; install a newer driver",
}


class Device(Protocol):
    """One GPU and one stream on it; everything but `synchronize` only puts work on the stream."""

    # The stream's handle, for TensorRT and the plugins.
    stream: int

    def activate(self) -> None:
        """Make the GPU current in the calling thread."""

    def free_bytes(self) -> int:
        """Return the bytes of memory that are free on the GPU."""

    def allocate(self, nbytes: int, what: str) -> int:
        """Return the address of new memory.

        Raises:
            EngineError: the GPU has not so much left; names `what` it was for.
        """

    def free(self, address: int) -> None:
        """Give memory back; nothing on the stream may still use it."""

    def zero(self, address: int, nbytes: int) -> None:
        """Fill memory with zeros."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a C-contiguous array to the GPU; it may be changed or dropped afterwards."""

    def download(self, array: Array, address: int) -> None:
        """Copy from the GPU to a C-contiguous array, which must live until `synchronize`."""

    def synchronize(self) -> None:
        """Wait until the stream has nothing left to do.

        Raises:
            EngineError: some work since the last call failed.
        """

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` puts on the stream as a CUDA graph, without running it.

        Raises:
            EngineError: the work cannot be captured; the stream goes on as before.
        """

    def launch(self, graph: Any) -> None:
        """Put a captured graph on the stream."""

    def release(self, graph: Any) -> None:
        """Destroy a captured graph."""

    def close(self) -> None:
        """Free all that was allocated and give the GPU back."""


class CudaDevice:
    """One GPU through the CUDA driver's API, in its primary context, which TensorRT and torch use too."""

    def __init__(self, index: int = 0) -> None:
        """Take a GPU by its index among those visible.

        Raises:
            EngineError: cuda-bindings is not installed, or the driver refuses.
        """
        self._cuda = _driver()
        self._sizes: dict[int, int] = {}
        self._call("cuInit", 0)
        self._gpu = self._call("cuDeviceGet", index)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._gpu)
        self.activate()
        self._stream = self._call("cuStreamCreate", self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.stream = int(self._stream)
        self._staging: list[tuple[Array, Any]] = []

    def activate(self) -> None:
        """See `Device`."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """See `Device`."""
        free, _total = self._call("cuMemGetInfo")
        return int(free)

    def allocate(self, nbytes: int, what: str) -> int:
        """See `Device`."""
        error, pointer = self._cuda.cuMemAlloc(max(nbytes, 1))
        if error == self._cuda.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise EngineError(
                f"the GPU's memory is full: {what} takes {nbytes:,} bytes, {self.free_bytes():,} are free; "
                f"{LOWER}."
            )
        self._check("cuMemAlloc", error)
        self._sizes[int(pointer)] = nbytes
        return int(pointer)

    def free(self, address: int) -> None:
        """See `Device`."""
        del self._sizes[address]
        self._call("cuMemFree", address)

    def zero(self, address: int, nbytes: int) -> None:
        """See `Device`."""
        if nbytes:
            self._call("cuMemsetD8Async", address, 0, nbytes, self._stream)

    def upload(self, address: int, array: Array) -> None:
        """See `Device`: large arrays go in pieces through pinned memory, one copied while one is filled."""
        flat = array.reshape(-1).view(np.uint8)
        if flat.nbytes <= STAGING_BYTES:
            # The driver has read pageable memory when this returns.
            self._copy_in(address, flat)
            return
        for piece, start in enumerate(range(0, flat.nbytes, STAGING_BYTES)):
            buffer, sent = self._pinned(piece % 2)
            part = flat[start : start + STAGING_BYTES]
            self._call("cuEventSynchronize", sent)
            buffer[: part.nbytes] = part
            self._copy_in(address + start, buffer[: part.nbytes])
            self._call("cuEventRecord", sent, self._stream)

    def _copy_in(self, address: int, flat: Array) -> None:
        if flat.nbytes:
            self._call("cuMemcpyHtoDAsync", address, flat.ctypes.data, flat.nbytes, self._stream)

    def _pinned(self, index: int) -> tuple[Array, Any]:
        """Return a pinned buffer and the event of its last copy."""
        while len(self._staging) <= index:
            pointer = int(self._call("cuMemHostAlloc", STAGING_BYTES, 0))
            raw = (ctypes.c_uint8 * STAGING_BYTES).from_address(pointer)
            buffer = np.ctypeslib.as_array(raw)
            event = self._call("cuEventCreate", self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            self._staging.append((buffer, event))
        return self._staging[index]

    def download(self, array: Array, address: int) -> None:
        """See `Device`."""
        if array.nbytes:
            self._call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self._stream)

    def synchronize(self) -> None:
        """See `Device`."""
        self._call("cuStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """See `Device`."""
        # Thread local: what other threads of the process do meanwhile must not break the capture.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", self._stream, mode)
        try:
            work()
        except BaseException:
            # A capture must be ended even if it is broken; its own error would hide the first one.
            error, graph = self._cuda.cuStreamEndCapture(self._stream)
            if error == self._cuda.CUresult.CUDA_SUCCESS:
                self._cuda.cuGraphDestroy(graph)
            raise
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        """See `Device`."""
        self._call("cuGraphLaunch", graph, self._stream)

    def release(self, graph: Any) -> None:
        """See `Device`."""
        # Unchecked: after an error nothing can be destroyed, and the error has been reported.
        self._cuda.cuGraphExecDestroy(graph)

    def close(self) -> None:
        """See `Device`: after an error that ends the context, what cannot be freed is left to the driver."""
        calls: list[tuple[str, Sequence[Any]]] = [
            ("cuCtxSetCurrent", (self._context,)),
            ("cuStreamSynchronize", (self._stream,)),
        ]
        for buffer, event in self._staging:
            calls += [("cuEventDestroy", (event,)), ("cuMemFreeHost", (buffer.ctypes.data,))]
        calls += [("cuMemFree", (address,)) for address in self._sizes]
        calls += [("cuStreamDestroy", (self._stream,)), ("cuDevicePrimaryCtxRelease", (self._gpu,))]
        self._staging, self._sizes = [], {}
        for name, arguments in calls:
            getattr(self._cuda, name)(*arguments)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *results = getattr(self._cuda, name)(*arguments)
        self._check(name, error)
        return results[0] if len(results) == 1 else results

    def _check(self, name: str, error: Any) -> None:
        if error == self._cuda.CUresult.CUDA_SUCCESS:
            return
        fix = _FIXES.get(error.name, "see `nvidia-smi` and `v4graph doctor`")
        raise EngineError(f"{name} failed on the GPU with {error.name}; {fix}.")


def _driver() -> Any:
    """Return the bindings of the CUDA driver.

    Raises:
        EngineError: cuda-bindings is not installed, or finds no driver library.
    """
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EngineError(
            "cuda-bindings is not installed; install it with `pip install 'v4graph[rtx]'` or 'v4graph[trt]'."
        ) from error
    try:
        driver.cuInit(0)
    except RuntimeError as error:  # cuda-pathfinder's, when there is no libcuda
        raise EngineError(
            "no CUDA driver is installed, so nothing can run on a GPU; install NVIDIA's driver."
        ) from error
    return driver
