"""Host memory that ends where a page begins that may not be touched: an overrun ends the emulated launch."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

_LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
_NONE = 0


class Guarded:
    """`nbytes` of memory full of 0xff (NaN as a float), 16-byte aligned, under 16 bytes before the guard."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        size = (nbytes + 15) // 16 * 16
        pages = (size + PAGE - 1) // PAGE * PAGE
        self._map = mmap.mmap(-1, pages + PAGE)
        whole = np.frombuffer(self._map, np.uint8)
        whole[:] = 0xFF
        start = whole.ctypes.data
        if _LIBC.mprotect(ctypes.c_void_p(start + pages), ctypes.c_size_t(PAGE), _NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
        self.address = start + pages - size
        self.bytes = whole[pages - size : pages - size + nbytes]

    def view(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the memory as a numpy array."""
        return self.bytes.view(dtype).reshape(shape)
