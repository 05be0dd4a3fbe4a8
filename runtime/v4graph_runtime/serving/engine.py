"""`Engine`: a session that many callers share, by continuous batching.

One thread runs the graph. Requests wait in the order in which they came, get a slot, read their prompt in
chunks between the steps of the outputs that run already, and leave the slot when they end.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from v4graph.errors import BusyError, SessionError
from v4graph_runtime.arguments import integers
from v4graph_runtime.constraint import Grammars
from v4graph_runtime.generate import check_room, check_vocabulary, stop_tokens
from v4graph_runtime.prefix_cache import PrefixCache
from v4graph_runtime.request import RequestOptions
from v4graph_runtime.serving.batch import Batch
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.serving.running import Request
from v4graph_runtime.serving.stats import EngineStats
from v4graph_runtime.session import Session
from v4graph_runtime.tokenizer import Tokenizer

DEFAULT = RequestOptions()


@dataclass(frozen=True)
class Limits:
    """How much an engine loop takes.

    Attributes:
        max_waiting: Requests that wait for a slot; one more is refused at once.
        prefill_tokens: Prompt tokens of one step, shared by the prompts that are being read. More make
            prompts faster, fewer let running outputs wait less.
        max_prompt_tokens: Longest prompt, None for what a slot holds.
    """

    max_waiting: int = 256
    prefill_tokens: int = 512
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_waiting", 0), ("prefill_tokens", 1), ("max_prompt_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SessionError(f"{name} is {value}, expected at least {least}.")


class Engine:
    """Generates for many callers at once; every method may be called from any thread.

    The session belongs to the engine until `close`, which does not close it.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        *,
        limits: Limits | None = None,
        cache: PrefixCache | None = None,
    ) -> None:
        """Start the loop's thread.

        Raises:
            SessionError: a tokenizer of another vocabulary.
        """
        check_vocabulary(session, tokenizer)
        self.session = session
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self._stop_ids = stop_tokens(session)
        self._grammars = Grammars(tokenizer, self._stop_ids, vocab_size=session.vocab_size)
        self._batch = Batch(session, tokenizer, self.limits.prefill_tokens, cache)
        self._names = itertools.count(1)
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._occupied = 0  # slots that are in use, or about to be
        self._closing = self._cancelling = False
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._loop, name="v4graph-engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: str | Sequence[int], options: RequestOptions = DEFAULT) -> Generation:
        """Queue a request and return its pieces to come; never waits.

        Args:
            prompt: Text, to which the BOS token is added, or token ids as they are.
            options: How to go on from it.

        Raises:
            BusyError: too many are waiting, or the engine is closing.
            SessionError: an empty prompt, no room for it and the new tokens, a token id outside the
                vocabulary, or a constraint that cannot be followed.
        """
        with self._changed:
            self._check_open()
        ids = (
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else integers("prompt", prompt).tolist()
        )
        self._check(ids, options)
        stop_ids = self._stop_ids if options.stop_ids is None else options.stop_ids
        matcher = self._grammars.matcher(options.constraint, stop_ids) if options.constraint else None
        generation = Generation(f"gen-{next(self._names)}", len(ids), self._wake)
        deadline = time.monotonic() + options.timeout if options.timeout else None
        request = Request(tuple(ids), options, stop_ids, generation, matcher, deadline)
        with self._changed:
            self._check_open()
            self._waiting.append(request)
            self._changed.notify_all()
        return generation

    def generate(self, prompt: str | Sequence[int], options: RequestOptions = DEFAULT) -> Generation:
        """As `submit`: `for piece in engine.generate(...)`, or `async for`."""
        return self.submit(prompt, options)

    def stats(self) -> EngineStats:
        """Return the figures of this moment."""
        batch, counters, session = self._batch, self._batch.counters, self.session
        with self._changed:
            # A request that is just being given its slot counts: it must not seem to be nowhere.
            running, waiting = min(self._occupied, session.batch), len(self._waiting)
        return EngineStats(
            slots=session.batch,
            capacity=session.capacity,
            state_bytes=session.state_bytes,
            running=running,
            waiting=waiting,
            held_tokens=batch.held_tokens if running else 0,
            uptime=time.monotonic() - self._began,
            finished=dict(counters.finished),
            refused=counters.refused,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            steps=counters.steps,
            busy_seconds=counters.busy_seconds,
            cache=batch.cache_figures(),
        )

    def close(self, drain: float = 0.0) -> None:
        """Refuse new requests, wait up to `drain` seconds for those there are, cancel the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._waiting or self._occupied), drain)
            self._cancelling = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        """Refuse a request that would wait behind too many; the lock is held."""
        room = self.limits.max_waiting + self.session.batch - self._occupied - len(self._waiting)
        if room > 0 and not self._closing:
            return
        self._batch.counters.refused += 1
        if self._closing:
            raise BusyError("the engine is closing and takes no more requests; send it to another.")
        raise BusyError(
            f"{len(self._waiting)} requests are waiting, which is all that the engine takes; try again later."
        )

    def _check(self, ids: list[int], options: RequestOptions) -> None:
        if not ids:
            raise SessionError("the prompt is empty; give at least one token.")
        for i, token in enumerate(ids):
            if not 0 <= token < self.session.vocab_size:
                last = self.session.vocab_size - 1
                raise SessionError(f"prompt token {i} is {token}, outside the vocabulary, 0 to {last}.")
        most = self.limits.max_prompt_tokens
        if most is not None and len(ids) > most:
            raise SessionError(f"the prompt has {len(ids)} tokens, at most {most} are taken; shorten it.")
        options.sampling.check(self.session.vocab_size)
        check_room(0, len(ids), options.max_new_tokens, self.session.capacity)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _loop(self) -> None:
        try:
            while self._await_work():
                self._round()
        except Exception as error:
            # A defect of the loop itself. Nobody may wait for it, and nothing new may come.
            self._give_up(error)

    def _round(self) -> None:
        # In this order, or what waits would not get the slot of what was cancelled before the next round.
        self._batch.drop()
        while (request := self._next()) is not None:
            self._batch.admit(request)
        self._batch.step()
        with self._changed:
            self._occupied = len(self._batch)
            self._changed.notify_all()

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self._closing = True
            self._batch.end_all("error", error)
            while self._waiting:
                self._batch.end(self._waiting.popleft().generation, "error", error)
            self._occupied = 0
            self._changed.notify_all()

    def _await_work(self) -> bool:
        """Wait for a request; return False when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._occupied or self._closing)
            if self._cancelling:
                for request in self._waiting:
                    request.generation.cancelled = True
                self._batch.end_all("cancelled")
            return bool(self._waiting or self._occupied)

    def _next(self) -> Request | None:
        """Take the request that has waited longest, if a slot is free; those nobody waits for always."""
        with self._changed:
            for i, request in enumerate(self._waiting):
                if request.over or not self._batch.full:
                    del self._waiting[i]
                    self._occupied = len(self._batch) + 1
                    return request
            # Of those just taken some may have failed or were over.
            self._occupied = len(self._batch)
            return None
