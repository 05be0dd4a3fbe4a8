"""A GPU played in host memory: a stream is a list of work that runs when it is waited for.

Work that is not waited for does not happen, a buffer that is freed too early is missed, an address
outside every buffer is noticed: mistakes that a real GPU would answer with nonsense at some other time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from v4graph.errors import EngineError

ALIGNMENT = 256


class HostDevice:
    def __init__(self, memory: int = 1 << 30) -> None:
        self.memory, self.stream = memory, 77
        self.blocks: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.uploads: list[int] = []
        self.captures = self.launches = self.live_graphs = 0
        self.active = self.closed = False

    def activate(self) -> None:
        self.active = True

    def free_bytes(self) -> int:
        return self.memory - sum(len(block) for block in self.blocks.values())

    def allocate(self, nbytes: int, what: str) -> int:
        assert self.active
        if nbytes > self.free_bytes():
            raise EngineError(f"the GPU's memory is full: {what} takes {nbytes:,} bytes.")
        raw = np.full(nbytes + ALIGNMENT, 0xA5, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        block = raw[offset : offset + nbytes]
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        assert not self.queue, "freed while the stream may still use it"
        del self.blocks[address]

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """Return the memory at an address, all of which must be in one buffer."""
        first = max((start for start in self.blocks if start <= address), default=-1)
        assert first >= 0, "an address before every buffer"
        block = self.blocks[first][address - first :]
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        assert nbytes <= len(block), f"{nbytes} bytes of a buffer of {len(block)}"
        return block[:nbytes].view(dtype).reshape(shape)

    def put(self, work: Callable[[], None]) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def zero(self, address: int, nbytes: int) -> None:
        self.put(lambda: self.blocks[address][:nbytes].fill(0))

    def upload(self, address: int, array: Any) -> None:
        assert self.recording is None, "a copy from numpy's memory cannot be replayed"
        assert array.flags.c_contiguous
        self.uploads.append(address)
        data = array.copy()
        if not data.nbytes:
            return
        self.put(lambda: np.copyto(self.view(address, data.shape, data.dtype), data))

    def download(self, array: Any, address: int) -> None:
        # No bytes may have an address behind the last one of a buffer.
        if not array.nbytes:
            return
        self.put(lambda: np.copyto(array, self.view(address, array.shape, array.dtype)))

    def synchronize(self) -> None:
        assert self.recording is None
        work, self.queue = self.queue, []
        for item in work:
            item()

    def capture(self, work: Callable[[], None]) -> Any:
        self.recording = []
        try:
            work()
            graph = tuple(self.recording)
        finally:
            self.recording = None
        self.captures += 1
        self.live_graphs += 1
        return graph

    def launch(self, graph: Any) -> None:
        self.launches += 1
        self.queue.extend(graph)

    def release(self, graph: Any) -> None:
        assert not self.closed
        self.live_graphs -= 1

    def close(self) -> None:
        self.blocks.clear()
        self.closed = True
