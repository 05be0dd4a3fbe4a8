"""Streamed pieces of text, cut off before the first stop text."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Lets text through that is certainly before any stop text; nothing is ever taken back.

    What comes out in all is the text before the earliest place where a stop text is found in the whole,
    however it was cut into pieces. So a stop text inside of what may still become a longer one that
    starts before it ends the text only when that is decided.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is certain now; nothing once `stopped`."""
        if self.stopped:
            return ""
        self._held += text
        open_at, found = self._open(), self._found()
        if 0 <= found <= open_at:
            return self._end(found)
        return self._take(open_at)

    def flush(self) -> str:
        """Return what is left at the end of the text; `stopped` may be set here too."""
        found = self._found()
        return self._end(found) if found >= 0 else self._take(len(self._held))

    def _found(self) -> int:
        """Return where the earliest stop text is in what is held, -1 if none is."""
        return min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)

    def _open(self) -> int:
        """Return where the first text starts that may become a stop text; the end if none does."""
        end = len(self._held)
        return min((self._begins(stop) for stop in self._stop), default=end)

    def _begins(self, stop: str) -> int:
        end = len(self._held)
        first = max(0, end - len(stop) + 1)
        return next((at for at in range(first, end) if stop.startswith(self._held[at:])), end)

    def _end(self, at: int) -> str:
        self.stopped = True
        text, self._held = self._held[:at], ""
        return text

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text
