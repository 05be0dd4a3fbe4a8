"""Ctrl-C that stops an answer instead of raising KeyboardInterrupt."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Protocol, Self


class Stoppable(Protocol):
    """What runs in another thread and can be asked to end."""

    def cancel(self) -> None: ...


class CtrlC:
    """While it is entered, Ctrl-C stops what `stops` was given, also if it was pressed before.

    An exception, which can come between any two instructions, could leave a lock held that the engine's
    thread waits for: then nothing would ever be answered again.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._stoppable: Stoppable | None = None
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def stops(self, stoppable: Stoppable) -> None:
        """Say what Ctrl-C is to stop."""
        self._stoppable = stoppable
        if self._pressed:
            stoppable.cancel()

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if self._stoppable is not None:
            self._stoppable.cancel()
