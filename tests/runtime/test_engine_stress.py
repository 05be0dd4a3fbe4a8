"""Callers who cancel, are late, go away and meet failures: each request ends once, and no slot is lost."""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from toy_engine import CAPACITY, VOCAB, ToyWeights

from v4graph.errors import BusyError, EngineError
from v4graph_runtime import PrefixCache, Session, Tokenizer
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.serving import Engine, Generation, Limits, RequestOptions

SLOTS, CALLERS, REQUESTS = 4, 8, 14
ONE_THREAD = OrtOptions(threads=1)


@dataclass
class Made:
    prompt: list[int]
    options: RequestOptions
    generation: Generation
    read: list[int]
    error: EngineError | None = None


class Callers:
    """Threads that submit; each has its own random numbers, so a seed tells what is asked for."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.made, self.refused = engine, list[Made](), 0
        self._threads = [
            threading.Thread(target=self._call, args=(random.Random(f"{seed} {i}"),)) for i in range(CALLERS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive(), "somebody waits for ever"

    # Greedy: a draw may fall so near between two tokens that the rounding of another schedule decides.
    def _call(self, draw: random.Random) -> None:
        for _ in range(REQUESTS):
            # Few beginnings, so that states are forked, restored and rolled back.
            begin = [draw.randrange(2, 5)] * draw.choice([0, 7, 20])
            prompt = [*begin, *(draw.randrange(2, VOCAB) for _ in range(draw.randrange(1, 20)))]
            options = RequestOptions(
                draw.randrange(1, 22),
                stop_ids=draw.choice([(), (3, 4)]),
                timeout=draw.choice([None, None, None, 1e-4, 0.02]),
            )
            try:
                one = Made(prompt, options, self.engine.submit(prompt, options), [])
            except BusyError:
                self.refused += 1
                time.sleep(0.001)
                continue
            self.made.append(one)
            try:
                draw.choice([self._read, self._read, self._read_async, self._leave])(one, draw)
            except EngineError as error:
                one.error = error

    def _read(self, one: Made, draw: random.Random) -> None:
        patience = draw.choice([0, 3, 99, 99, 99])
        for piece in one.generation:
            one.read += [piece.token] * (piece.token is not None)
            if len(one.read) == patience:
                one.generation.cancel()
        if patience == 0:
            one.generation.cancel()  # too late, and harmless

    def _read_async(self, one: Made, draw: random.Random) -> None:
        async def read() -> None:
            async for piece in one.generation:
                one.read += [piece.token] * (piece.token is not None)

        with contextlib.suppress(TimeoutError):
            asyncio.run(asyncio.wait_for(read(), draw.choice([0.001, 0.01, 9])))
            return
        # This event loop is closed, which the engine may not notice.
        one.generation.cancel()

    def _leave(self, one: Made, draw: random.Random) -> None:
        time.sleep(draw.choice([0, 0.002]))
        one.generation.cancel()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each generation was ended."""
    counts: Counter[str] = Counter()
    end = Generation.end

    def counted(self: Generation, *args: Any) -> None:
        counts[self.id] += 1
        end(self, *args)

    monkeypatch.setattr(Generation, "end", counted)
    return counts


def alone(engine: Path, weights: ToyWeights, tokenizer: Tokenizer) -> Any:
    """Return a function that gives the tokens of a request that has a session for itself."""
    loop = Engine(Session(engine, weights, options=ONE_THREAD), tokenizer)
    known: dict[Any, list[int]] = {}

    def run(one: Made) -> list[int]:
        options = replace(one.options, timeout=None)
        key = tuple(one.prompt), options.max_new_tokens, options.stop_ids
        if key not in known:
            generation = loop.submit(one.prompt, options)
            generation.text()
            known[key] = generation.ids
        return known[key]

    return run


def break_sometimes(session: Session, cache: PrefixCache, seed: int, patch: pytest.MonkeyPatch) -> None:
    """Let runs fail, before and behind the graph, by our own errors and by others; and the cache too."""
    draw, backend = random.Random(seed), session._backend
    assert backend is not None
    run, read = backend.run, backend.read_state

    def failing(*args: Any) -> None:
        chance = draw.random()
        if chance < 0.01:
            raise EngineError("the backend failed")
        run(*args)
        if chance > 0.99:
            raise MemoryError("behind the graph")

    def unreadable(*args: Any) -> Any:
        if draw.random() < 0.02:
            raise EngineError("a state cannot be read")
        return read(*args)

    patch.setattr(backend, "run", failing)
    patch.setattr(backend, "read_state", unreadable)


def check(made: list[Made], ends: Counter[str], expected: Any) -> None:
    for one in made:
        generation = one.generation
        assert ends[generation.id] == 1
        whole = expected(one)
        assert generation.ids == whole[: len(generation.ids)]
        assert one.read == generation.ids[: len(one.read)]
        if one.error is not None:
            assert generation.finish == "error"
        if generation.finish == "length":
            assert len(generation.ids) == one.options.max_new_tokens
        elif generation.finish == "stop":
            assert generation.ids == whole
            assert len(generation.ids) < one.options.max_new_tokens
        else:
            assert generation.finish in ("cancelled", "error")
            assert generation.finish == "error" or generation.cancelled or one.options.timeout


@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_once_and_right_whatever_happens(
    engine: Path,
    weights: ToyWeights,
    tokenizer: Tokenizer,
    ends: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    session = Session(engine, weights, batch=SLOTS, options=ONE_THREAD)
    cache = PrefixCache(interval=6, max_bytes=40_000)
    expected = alone(engine, weights, tokenizer)
    with Engine(session, tokenizer, limits=Limits(6, prefill_tokens=9), cache=cache) as loop:
        with monkeypatch.context() as patch:
            break_sometimes(session, cache, seed, patch)
            callers = Callers(loop, seed)
            callers.start()
            callers.join()
            end = time.monotonic() + 5
            while (stats := loop.stats()).running or stats.waiting:
                assert time.monotonic() < end
                time.sleep(0.001)
        finished = Counter(one.generation.finish for one in callers.made)
        assert stats.finished == finished
        assert stats.refused == callers.refused
        assert min(finished[finish] for finish in ("length", "cancelled")) > 5
        # All slots are there, and what they and the cache kept is right.
        after = [[3] * 20 + [i] * 5 for i in range(5, 5 + SLOTS)]
        options = RequestOptions(CAPACITY - 25, stop_ids=())
        last = [Made(prompt, options, loop.submit(prompt, options), []) for prompt in after]
        for one in last:
            one.generation.text()
            assert one.generation.finish == "length"
    check([*callers.made, *last], ends, expected)


@pytest.mark.parametrize("drain", [0.0, 0.03, 20.0])
def test_closing_while_others_submit_leaves_nobody_waiting(
    engine: Path, weights: ToyWeights, tokenizer: Tokenizer, ends: Counter[str], drain: float
) -> None:
    session = Session(engine, weights, batch=SLOTS, options=ONE_THREAD)
    loop = Engine(session, tokenizer, limits=Limits(6, prefill_tokens=9), cache=PrefixCache(interval=6))
    callers = Callers(loop, 7)
    callers.start()
    time.sleep(0.03)
    closers = [threading.Thread(target=loop.close, args=(drain,)) for _ in range(2)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(10)
        assert not closer.is_alive()
    callers.join()
    assert not loop._thread.is_alive()
    assert loop.stats().running == loop.stats().waiting == 0
    assert callers.refused
    cut = [one for one in callers.made if one.generation.finish == "cancelled"]
    if drain > 1:
        assert all(one.generation.cancelled or one.options.timeout for one in cut)
    for one in callers.made:
        assert ends[one.generation.id] == 1
        assert one.generation.finish in ("stop", "length", "cancelled")


def test_a_defect_of_the_loop_ends_all_requests_and_the_engine(
    engine: Path, weights: ToyWeights, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Engine(Session(engine, weights, batch=1, options=ONE_THREAD), tokenizer)
    begun = threading.Event()

    def broken() -> None:
        assert begun.wait(5)
        raise KeyError("a defect")

    monkeypatch.setattr(loop._batch, "step", broken)
    made = [loop.submit([5], RequestOptions(5)) for _ in range(3)]
    begun.set()
    for one in made:
        with pytest.raises(EngineError, match="the engine loop failed"):
            one.text()
    with pytest.raises(BusyError, match="closing"):
        loop.submit([5], RequestOptions(5))
    loop.close()
