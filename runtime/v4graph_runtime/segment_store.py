"""Where segments are kept: in memory, or as one file each in a folder that processes may share."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from v4graph.errors import SessionError
from v4graph_runtime.segment import KIND, Segment, pack_segment, read_segment
from v4graph_runtime.slot_state import Rows, SlotState
from v4graph_runtime.state_file import PARTIAL, opened, write_durably

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# A file under a temporary name that is older than this has lost its writer.
_ABANDONED_S = 600.0


@dataclass(frozen=True)
class Found:
    """A segment that was there already: its bytes, and when it was last used (ns)."""

    segment: Segment
    nbytes: int
    used: int


class Store(Protocol):
    """Keeps the rows of segments by key."""

    def scan(self) -> Iterator[Found | str]:
        """Yield what is there; a string says why a file is none of it."""

    def ready(self) -> bool:
        """Return whether there is room for one more segment that waits to be written."""

    def write(self, segment: Segment, state: SlotState) -> None:
        """Keep a segment, now or in a while; `state` is the segment's own tokens and rows."""

    def flush(self) -> None:
        """Wait until all that was kept is written."""

    def read(self, key: str, *, rings: bool) -> tuple[Segment, Rows, Rows]:
        """Return a segment, its cache rows and, if asked for, its rings.

        Raises:
            FileNotFoundError: it is not there, or no longer.
            OSError: it cannot be read.
            SessionError: it is damaged.
        """

    def remove(self, key: str) -> None:
        """Forget a segment, if it is there."""

    def touch(self, key: str, now: int) -> None:
        """Note that a segment was used."""

    def holds(self, key: str) -> bool:
        """Return whether a segment is there."""


class MemoryStore:
    """Segments in this process."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Segment, SlotState]] = {}

    def scan(self) -> Iterator[Found | str]:
        """See `Store`."""
        yield from ()

    def ready(self) -> bool:
        """See `Store`."""
        return True

    def write(self, segment: Segment, state: SlotState) -> None:
        """See `Store`."""
        self._held[segment.key] = segment, state

    def flush(self) -> None:
        """See `Store`."""

    def read(self, key: str, *, rings: bool) -> tuple[Segment, Rows, Rows]:
        """See `Store`."""
        segment, state = self._held[key]
        return segment, state.appended, state.rings if rings else {}

    def remove(self, key: str) -> None:
        """See `Store`."""
        self._held.pop(key, None)

    def touch(self, key: str, now: int) -> None:
        """See `Store`."""

    def holds(self, key: str) -> bool:
        """See `Store`."""
        return key in self._held


class FolderStore:
    """Files named by their keys, which `WriteBehind` writes: two processes that write one write the same."""

    def __init__(self, folder: Path) -> None:
        """Make the folder.

        Raises:
            OSError: it cannot be made.
        """
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def scan(self) -> Iterator[Found | str]:
        """See `Store`: reads headers and tokens only."""
        for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
            path = Path(entry.path)
            if entry.name.endswith(PARTIAL):
                _remove_if_abandoned(path)
                continue
            try:
                with opened(path, KIND) as file:
                    segment = read_segment(file)
                status = path.stat()
            except FileNotFoundError:
                continue
            except (OSError, SessionError) as error:
                yield str(error)
                continue
            if entry.name != segment.key + SUFFIX:
                yield f"{path}: its name is not that of its contents; remove it."
                continue
            yield Found(segment, status.st_size, status.st_mtime_ns)

    def write(self, segment: Segment, state: SlotState) -> int:
        """Write a segment's file, forced to the disk; return its bytes.

        Raises:
            OSError: there is no room, or no leave.
        """
        content = pack_segment(segment, state)
        write_durably(self._path(segment.key), content)
        return len(content)

    def read(self, key: str, *, rings: bool) -> tuple[Segment, Rows, Rows]:
        """See `Store`."""
        with opened(self._path(key), KIND) as file:
            return read_segment(file), file.group("appended"), file.group("rings") if rings else {}

    def remove(self, key: str) -> None:
        """See `Store`."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def touch(self, key: str, now: int) -> None:
        """See `Store`: the file's time is what the next process sees."""
        with contextlib.suppress(OSError):
            os.utime(self._path(key), ns=(now, now))

    def holds(self, key: str) -> bool:
        """See `Store`."""
        return self._path(key).is_file()

    def _path(self, key: str) -> Path:
        return self._folder / (key + SUFFIX)


def _remove_if_abandoned(path: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            path.unlink()
