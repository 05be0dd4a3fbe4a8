"""The slots of a session and the requests in them: admission, one step at a time, and what ends.

Only one thread uses it; `Engine` is that thread.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from v4graph.errors import EngineError, SessionError, V4GraphError
from v4graph_runtime.prefix_cache import PrefixCache
from v4graph_runtime.request import Finish
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.serving.running import Request, Running
from v4graph_runtime.serving.schedule import Run, plan, whole
from v4graph_runtime.serving.stats import Counters
from v4graph_runtime.session import Session
from v4graph_runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Batch:
    """Requests in slots; `step` runs the graph for all of them."""

    def __init__(
        self, session: Session, tokenizer: Tokenizer, prefill_tokens: int, cache: PrefixCache | None
    ) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._prefill_tokens = prefill_tokens
        self._cache = cache
        self._running: dict[int, Running] = {}
        self.counters = Counters()
        self.held_tokens = 0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return len(self._running) == self._session.batch

    def admit(self, request: Request) -> None:
        """Give a request the first free slot, so that slots in use stay near to each other."""
        if request.over:
            self.end(request.generation, "cancelled")
            return
        try:
            self._enter(request)
        except Exception as error:
            self.end(request.generation, "error", error)

    def end(self, generation: Generation, finish: Finish, error: Exception | None = None) -> None:
        """End a request that has no slot, or has left it."""
        self.counters.finished[finish] += 1
        generation.end(finish, None if error is None else _ours(error))

    def _enter(self, request: Request) -> None:
        slot = next(slot for slot in range(self._session.batch) if slot not in self._running)
        cached = self._reuse(slot, request.prompt)
        request.generation.cached_tokens = cached
        self.counters.prompt_tokens += len(request.prompt)
        self.counters.cached_tokens += cached
        self._running[slot] = Running(request, self._tokenizer)

    def _reuse(self, slot: int, prompt: Sequence[int]) -> int:
        """Empty a slot but for what is known of a prompt's beginning; return the tokens of that."""
        if self._cache is not None:
            try:
                return self._cache.reuse(self._session, slot, prompt)
            except Exception:
                logger.exception("no state was reused; the prompt is read from its beginning")
        self._session.reset([slot])
        return 0

    def _keep(self, slot: int) -> None:
        """Keep a slot's state; a request does not fail because that fails."""
        if self._cache is None:
            return
        try:
            self._cache.store(self._session, slot)
        except Exception:
            logger.exception("a state was not kept")

    def drop(self) -> None:
        """End what was cancelled or is late."""
        for slot, running in list(self._running.items()):
            if running.request.over:
                self._release(slot, "cancelled")

    def end_all(self, finish: Finish, error: Exception | None = None) -> None:
        """End everything that has a slot."""
        for slot in list(self._running):
            self._release(slot, finish, error)

    def step(self) -> None:
        """Run the tokens that come next and sample where all of a slot's tokens have run."""
        if not self._running:
            return
        began = time.perf_counter()
        try:
            for run in self._plan():
                self._run(run)
        except Exception as error:
            self.end_all("error", error)
        self.counters.steps += 1
        self.counters.busy_seconds += time.perf_counter() - began
        positions = self._session.position
        self.held_tokens = int(sum(positions[slot] for slot in self._running))

    def _plan(self) -> list[Run]:
        positions = self._session.position
        pending = {slot: len(one.ids) - int(positions[slot]) for slot, one in self._running.items()}
        # A state that is to be kept is kept at a multiple of the interval.
        interval = self._cache.interval if self._cache else self._session.capacity
        longest = {slot: interval - int(positions[slot]) % interval for slot in pending}
        runs = plan(pending, self._prefill_tokens, longest)
        return runs if self._session.slot_ranges else [whole(runs, self._session.batch)]

    def _run(self, run: Run) -> None:
        session = self._session
        slots = [slot for slot, count in zip(run.slots, run.counts, strict=True) if count]
        ids = np.zeros((len(run.slots), max(run.counts)), np.int64)
        positions = session.position
        for row, slot in enumerate(run.slots):
            count, start = run.counts[row], int(positions[slot])
            if count:
                ids[row, :count] = self._running[slot].ids[start : start + count]
        try:
            logits = session.prefill(ids, run.counts, slots=run.slots)
        except Exception as error:
            for slot in slots:
                self._release(slot, "error", error)
            return
        for slot in slots:
            row = slot - run.slots.start
            last = logits[row] if logits.ndim == 2 else logits[row, run.counts[row] - 1]
            try:
                self._advance(slot, last)
            except Exception as error:
                self._release(slot, "error", error)

    def _advance(self, slot: int, logits: Any) -> None:
        """Go on behind the tokens that have run; `logits` [V] follow the last of them."""
        running, position = self._running[slot], int(self._session.position[slot])
        if position < len(running.ids):
            if self._cache and position % self._cache.interval == 0:
                self._keep(slot)
            return
        if running.reads_prompt:
            self._keep(slot)
        before = len(running.ids)
        finish = running.take(logits)
        self.counters.generated_tokens += len(running.ids) - before
        if finish:
            # Before the end is told: whoever waited for it may use the session, as `Dialogue` does.
            self._keep(slot)
            self._release(slot, finish)

    def _release(self, slot: int, finish: Finish, error: Exception | None = None) -> None:
        self.end(self._running.pop(slot).generation, finish, error)

    def cache_figures(self) -> dict[str, Any]:
        """Return the prefix cache's figures."""
        return dataclasses.asdict(self._cache.stats) if self._cache else {}


def _ours(error: Exception) -> V4GraphError:
    """Return an error for the caller; what is not one of ours is a defect and goes to the log."""
    if isinstance(error, SessionError):
        # What a caller can mend was refused before: logits that are no numbers are the engine's.
        return EngineError(str(error.args[0]), detail=error.detail)
    if isinstance(error, V4GraphError):
        return error
    logger.error("a request failed in the engine loop", exc_info=error)
    ours = EngineError(f"the engine loop failed ({type(error).__name__}: {error}); its log says where.")
    ours.__cause__ = error
    return ours
