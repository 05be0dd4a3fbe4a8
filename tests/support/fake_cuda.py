"""The names of cuda.bindings.driver that the runtime calls, over host memory, with every call recorded."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from typing import Any

import numpy as np


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_UNKNOWN = 999


class _Flags(enum.IntEnum):
    CU_STREAM_NON_BLOCKING = 1
    CU_EVENT_DISABLE_TIMING = 2
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class FakeDriver:
    """`errors` maps a call's name to what it fails with."""

    CUresult = CUresult
    CUstream_flags = CUevent_flags = CUstreamCaptureMode = _Flags

    def __init__(self) -> None:
        self.errors: dict[str, CUresult] = {}
        self.calls: list[str] = []
        self.copies: list[int] = []
        self.memory: dict[int, Any] = {}
        self._answers: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cuDeviceGet": lambda index: (index,),
            "cuDevicePrimaryCtxRetain": lambda _device: (11,),
            "cuStreamCreate": lambda _flags: (22,),
            "cuEventCreate": lambda _flags: (33,),
            "cuMemGetInfo": lambda: (1234, 5678),
            "cuMemAlloc": self._allocate,
            "cuMemHostAlloc": lambda nbytes, _flags: self._allocate(nbytes),
            "cuMemFree": self._free,
            "cuMemFreeHost": self._free,
            "cuMemsetD8Async": self._fill,
            "cuMemcpyHtoDAsync": self._copy,
            "cuMemcpyDtoHAsync": self._copy,
            "cuStreamEndCapture": lambda _stream: ("graph",),
            "cuGraphInstantiate": lambda graph, _flags: (f"executable {graph}",),
        }

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            error = self.errors.get(name, CUresult.CUDA_SUCCESS)
            results = (0,) if error else self._answers.get(name, lambda *_: ())(*arguments)
            return (error, *results)

        return call

    def _allocate(self, nbytes: int) -> tuple[int]:
        block = np.zeros(nbytes, np.uint8)
        self.memory[block.ctypes.data] = block
        return (block.ctypes.data,)

    def _free(self, address: int) -> tuple[()]:
        del self.memory[address]
        return ()

    def _fill(self, address: int, value: int, nbytes: int, _stream: Any) -> tuple[()]:
        ctypes.memset(address, value, nbytes)
        return ()

    def _copy(self, target: int, source: int, nbytes: int, _stream: Any) -> tuple[()]:
        self.copies.append(nbytes)
        ctypes.memmove(target, source, nbytes)
        return ()
