"""The generations of one request, and the answer made of them: whole, or event by event."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Literal, Protocol

from v4graph_runtime.request import Piece, RequestOptions
from v4graph_runtime.serving import sse
from v4graph_runtime.serving.errors import ApiError, as_api_error, shutting_down
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.serving.job import Job
from v4graph_runtime.serving.service import Service

Event = dict[str, Any]
# None is the end of a choice, "" nothing new.
Item = Piece | Literal[""] | None
Queue = asyncio.Queue[tuple[int, Item | Exception]]


class Choice(Protocol):
    """One of the answers: pieces in, the API's choices out."""

    def begin(self) -> list[Event]:
        """Return the choices of the stream's first events."""
        ...

    def push(self, piece: Piece) -> list[Event]:
        """Return the choices of the events that a piece makes."""
        ...

    def end(self, cut: bool) -> list[Event]:
        """Return the choices of the last events; `cut` says that more would have followed."""
        ...

    def whole(self) -> Event:
        """Return the choice of an answer that is no stream."""
        ...

    @property
    def reasoning_tokens(self) -> int: ...


class Answer:
    """What is generated for one request. `close` stops what is not finished, and may be called twice."""

    def __init__(self, service: Service, job: Job, choices: list[Choice]) -> None:
        """Submit everything, or nothing.

        Raises:
            V4GraphError: the engine refused.
        """
        self._service, self._job, self._choices = service, job, choices
        self._created = int(time.time())
        self._generations: list[Generation] = []
        try:
            for ids, options in _requests(job):
                self._generations.append(service.engine.submit(ids, options))
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        for generation in self._generations:
            generation.cancel()

    async def whole(self) -> Event:
        """Wait for the whole answer."""
        async with aclosing(self._items()) as batches:
            async for items in batches:
                for index, item in items:
                    self._read(index, item)
        return self._body(0, [choice.whole() for choice in self._choices]) | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the events of a stream; an error is one too, and the last."""
        try:
            yield self._written([event for choice in self._choices for event in choice.begin()])
            async with aclosing(self._items(self._service.options.keep_alive)) as batches:
                async for items in batches:
                    # What came while the last events were sent goes out at once.
                    events = [event for one in items for event in self._read(*one)]
                    ticks = any(item == "" for _, item in items)
                    if data := self._written(events) + (sse.KEEP_ALIVE if ticks else b""):
                        yield data
            if self._job.include_usage:
                yield sse.event(self._body(1, []) | {"usage": self._usage()})
            yield sse.DONE
        except Exception as error:
            yield sse.event(as_api_error(error, closing=self._service.closing).body)

    async def _items(self, tick: float | None = None) -> AsyncGenerator[list[tuple[int, Item]]]:
        """Yield what has come of the choices, never nothing; every `tick` seconds also an item "".

        Raises:
            Exception: a generation's, behind what it had.
        """
        queue: Queue = asyncio.Queue()
        pumps = [_pump(i, one, queue) for i, one in enumerate(self._generations)]
        tasks = [asyncio.create_task(one) for one in (*pumps, *([_tick(tick, queue)] if tick else []))]
        left = len(pumps)
        try:
            while left:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                if came := [(i, item) for i, item in items if not isinstance(item, Exception)]:
                    yield came
                for _, item in items:
                    if isinstance(item, Exception):
                        raise item
                    left -= item is None
        finally:
            self.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _read(self, index: int, item: Item) -> list[Event]:
        """Return the choices of the events that an item makes."""
        if item is None:
            return self._end(index)
        return self._choices[index].push(item) if isinstance(item, Piece) else []

    def _written(self, choices: list[Event]) -> bytes:
        return b"".join(sse.event(self._chunk([choice])) for choice in choices)

    def _end(self, index: int) -> list[Event]:
        """Finish a choice.

        Raises:
            ApiError: it was cancelled before it had a token.
        """
        generation = self._generations[index]
        cancelled = generation.finish == "cancelled"
        if cancelled and not generation.new_tokens:
            raise self._too_late()
        self._service.finished(self._job.id, generation)
        return self._choices[index].end(cancelled or generation.finish == "length")

    def _too_late(self) -> ApiError:
        if self._service.closing:
            return shutting_down()
        seconds = self._service.options.timeout or 0
        return ApiError(
            504,
            f"no token within {seconds:g} s; ask again later, or with a shorter prompt.",
            code="timeout",
        )

    def _chunk(self, choices: list[Event]) -> Event:
        chunk = self._body(1, choices)
        if self._job.usage_everywhere:
            return chunk | {"usage": self._usage()}
        return chunk | ({"usage": None} if self._job.include_usage else {})

    def _body(self, kind: int, choices: list[Event]) -> Event:
        return {
            "id": self._job.id,
            "object": self._job.kinds[kind],
            "created": self._created,
            "model": self._service.options.model_name,
            "choices": choices,
        }

    def _usage(self) -> Event:
        """Return the tokens so far; a prompt counts once, whatever number of choices it has."""
        prompts = self._generations[:: self._job.n]
        prompt = sum(one.prompt_tokens for one in prompts)
        new = sum(one.new_tokens for one in self._generations)
        reasoning = sum(choice.reasoning_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
            "completion_tokens_details": {"reasoning_tokens": reasoning},
        }


def _requests(job: Job) -> Iterator[tuple[list[int], RequestOptions]]:
    for ids, options in job.prompts:
        for i in range(job.n):
            seed = options.sampling.seed
            sampling = dataclasses.replace(options.sampling, seed=None if seed is None else seed + i)
            yield ids, dataclasses.replace(options, sampling=sampling)


async def _pump(index: int, generation: Generation, queue: Queue) -> None:
    try:
        async for piece in generation:
            queue.put_nowait((index, piece))
    except Exception as error:  # raised where the queue is read
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))


async def _tick(seconds: float, queue: Queue) -> None:
    while True:
        await asyncio.sleep(seconds)
        queue.put_nowait((0, ""))
