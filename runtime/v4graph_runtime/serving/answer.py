"""The generations of one request, and the answer made of them: whole, or event by event."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from v4graph_runtime.request import Piece, RequestOptions
from v4graph_runtime.serving import sse
from v4graph_runtime.serving.errors import ApiError, as_api_error
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.serving.job import Job
from v4graph_runtime.serving.service import Service

Event = dict[str, Any]


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
        async with aclosing(self._pieces()) as pieces:
            async for index, piece in pieces:
                if piece is not None and index is not None:
                    self._choices[index].push(piece)
        for index in range(len(self._choices)):
            self._end(index)
        return self._body(0, [choice.whole() for choice in self._choices]) | {"usage": self._usage()}

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield the events of a stream; an error is one too, and the last."""
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    yield sse.KEEP_ALIVE if chunk is None else sse.event(chunk)
            yield sse.DONE
        except Exception as error:
            yield sse.event(as_api_error(error, closing=self._service.closing).body)

    async def _chunks(self) -> AsyncGenerator[Event | None]:
        for choice in self._choices:
            for event in choice.begin():
                yield self._chunk([event])
        async with aclosing(self._pieces(self._service.options.keep_alive)) as pieces:
            async for index, piece in pieces:
                if index is None:
                    yield None
                    continue
                choice = self._choices[index]
                for event in choice.push(piece) if piece is not None else self._end(index):
                    yield self._chunk([event])
        if self._job.include_usage:
            yield self._body(1, []) | {"usage": self._usage()}

    async def _pieces(self, patience: float | None = None) -> AsyncGenerator[tuple[int | None, Piece | None]]:
        """Yield (choice, piece) as they come, (choice, None) at a choice's end, None after `patience`."""
        queue: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
        tasks = [asyncio.create_task(_pump(i, one, queue)) for i, one in enumerate(self._generations)]
        left = len(tasks)
        try:
            while left:
                try:
                    index, item = await asyncio.wait_for(queue.get(), patience)
                except TimeoutError:
                    yield None, None
                    continue
                if isinstance(item, Exception):
                    raise item
                left -= item is None
                yield index, item
        finally:
            self.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
            return ApiError(503, "the server is shutting down; ask again later.", code="shutting_down")
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


async def _pump(
    index: int, generation: Generation, queue: asyncio.Queue[tuple[int, Piece | Exception | None]]
) -> None:
    try:
        async for piece in generation:
            queue.put_nowait((index, piece))
    except Exception as error:  # raised again where the queue is read
        queue.put_nowait((index, error))
    else:
        queue.put_nowait((index, None))
