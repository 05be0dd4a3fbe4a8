"""Segments written to a folder by a thread, so that who keeps one does not wait for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from v4graph_runtime.segment import Segment
from v4graph_runtime.segment_store import FolderStore, Found
from v4graph_runtime.slot_state import Rows, SlotState

# Segments that wait to be written, in memory; when there are so many, others are not kept.
MOST_WAITING = 16
Done = Callable[[str, "int | Exception"], None]
Waiting = tuple[Segment, SlotState]


class WriteBehind:
    """A `Store` on a folder; segments are written in the order in which they came, parents first.

    `done` hears, in the thread and with no lock held, of each key the bytes of its file or what went wrong.
    The interpreter's end waits for what is to be written; a crash loses it, and leaves no part of it.
    """

    def __init__(self, folder: FolderStore, done: Done) -> None:
        self._folder, self._done = folder, done
        self._waiting: dict[str, Waiting] = {}
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "v4graph-prefix-cache")
        self._last: Future[None] | None = None

    def scan(self) -> Iterator[Found | str]:
        """See `Store`."""
        return self._folder.scan()

    def ready(self) -> bool:
        """See `Store`."""
        return len(self._waiting) < MOST_WAITING

    def write(self, segment: Segment, state: SlotState) -> None:
        """See `Store`."""
        with self._lock:
            self._waiting[segment.key] = waiting = segment, state
        self._last = self._thread.submit(self._write, segment.key, waiting)

    def read(self, key: str, *, rings: bool) -> tuple[Segment, Rows, Rows]:
        """See `Store`."""
        with self._lock:
            waiting = self._waiting.get(key)
        if waiting is None:
            return self._folder.read(key, rings=rings)
        segment, state = waiting
        return segment, state.appended, state.rings if rings else {}

    def remove(self, key: str) -> None:
        """See `Store`."""
        with self._lock:
            self._waiting.pop(key, None)
            self._folder.remove(key)

    def touch(self, key: str, now: int) -> None:
        """See `Store`."""
        self._folder.touch(key, now)

    def holds(self, key: str) -> bool:
        """See `Store`."""
        return key in self._waiting or self._folder.holds(key)

    def flush(self) -> None:
        """See `Store`."""
        if self._last is not None:
            wait([self._last])

    def _write(self, key: str, waiting: Waiting) -> None:
        if self._waiting.get(key) is not waiting:
            return  # removed before its turn
        result: int | Exception
        try:
            result = self._folder.write(*waiting)
        except Exception as error:  # whatever it is, `done` hears of it
            result = error
        with self._lock:
            if self._waiting.get(key) is waiting:
                del self._waiting[key]
            elif key not in self._waiting:
                self._folder.remove(key)  # removed while it was written
        self._done(key, result)
