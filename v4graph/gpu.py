"""The NVIDIA GPUs and the driver of this machine, asked of the driver library itself.

Through ctypes, because the command that says what is missing must work where nothing is installed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its target ("sm90") and its memory."""

    name: str
    target: str
    memory_bytes: int


@functools.cache
def _driver() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver runs, (13, 0), or None without a working driver."""
    library, version = _driver(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that this process may use; none without a driver."""
    library, count = _driver(), ctypes.c_int()
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(library, index) for index in range(count.value))


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    for value, attribute in ((major, _COMPUTE_CAPABILITY_MAJOR), (minor, _COMPUTE_CAPABILITY_MINOR)):
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Gpu(name.value.decode(), f"sm{major.value}{minor.value}", memory.value)
