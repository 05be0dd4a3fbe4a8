"""What a caller holds of a request: an iterator over its pieces, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Self

from v4graph.errors import V4GraphError
from v4graph_runtime.request import Finish, Piece

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class Generation(Iterator[Piece], AsyncIterator[Piece]):
    """Pieces of one output as they are made; for one consumer, which may be slower than the engine.

    Attributes:
        id: Unique in the process.
        prompt_tokens: Tokens of the prompt; `cached_tokens` of them were in a kept state.
        ids: Tokens generated so far, without the one that ended the output.
        finish: Why it ended, empty before.
        cancelled: Whether `cancel` was called.
        time_to_first_token: Seconds from `submit` to the first token, 0 before.
    """

    def __init__(self, name: str, prompt_tokens: int, wake_engine: Callable[[], None]) -> None:
        self.id = name
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.ids: list[int] = []
        self.finish: Finish = ""
        self.time_to_first_token = 0.0
        self.cancelled = False
        self._began = time.perf_counter()
        self._wake_engine = wake_engine
        self._pieces: deque[Piece] = deque()
        self._error: V4GraphError | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._waiter: Waiter | None = None

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.ids)

    def cancel(self) -> None:
        """Ask the engine to stop; the pieces made before it does can still be read."""
        self.cancelled = True
        self._wake_engine()

    def text(self) -> str:
        """Wait for the end and return the text of all pieces not read yet.

        Raises:
            V4GraphError: what made the request fail.
        """
        return "".join(piece.text for piece in self)

    def __next__(self) -> Piece:
        """Wait for the next piece.

        Raises:
            V4GraphError: what made the request fail.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._ended)
            piece = self._take()
        if piece is None:
            raise StopIteration
        return piece

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """As `__next__`, without blocking the event loop."""
        while True:
            with self._changed:
                if self._pieces or self._ended:
                    piece = self._take()
                    break
                loop = asyncio.get_running_loop()
                future = loop.create_future()
                self._waiter = loop, future
            await future
        if piece is None:
            raise StopAsyncIteration
        return piece

    def put(self, piece: Piece) -> None:
        """Hand a piece over; the engine's side, as `end`."""
        if piece.token is not None:
            self.time_to_first_token = self.time_to_first_token or self.seconds
            self.ids.append(piece.token)
        with self._changed:
            self._pieces.append(piece)
            self._wake()

    def end(self, finish: Finish, error: V4GraphError | None = None) -> None:
        """Nothing follows."""
        with self._changed:
            self.finish, self._error, self._ended = finish, error, True
            self._wake()

    @property
    def seconds(self) -> float:
        """Seconds since it was submitted."""
        return time.perf_counter() - self._began

    def _take(self) -> Piece | None:
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, future = waiter
            # The consumer's loop may be closed: then nobody reads on.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_set, future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
