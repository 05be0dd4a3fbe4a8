import asyncio
import threading
import time

import pytest

from v4graph.errors import EngineError
from v4graph_runtime.request import Piece
from v4graph_runtime.serving.generation import Generation

PIECES = [Piece(i, str(i)) for i in range(5)] + [Piece(None, "!")]


def feed(generation: Generation, error: EngineError | None = None, pause: float = 0.001) -> threading.Thread:
    def run() -> None:
        for piece in PIECES:
            time.sleep(pause)
            generation.put(piece)
        generation.end("error" if error else "stop", error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.fixture
def generation() -> Generation:
    return Generation("gen-1", 3, lambda: None)


def test_pieces_come_in_order(generation: Generation) -> None:
    feed(generation)
    assert list(generation) == PIECES
    assert list(generation) == []
    assert (generation.ids, generation.new_tokens, generation.finish) == ([0, 1, 2, 3, 4], 5, "stop")
    assert generation.time_to_first_token > 0


def test_text_waits_for_the_end(generation: Generation) -> None:
    feed(generation)
    assert generation.text() == "01234!"


def test_asyncio_reads_without_blocking_its_loop(generation: Generation) -> None:
    async def read() -> tuple[list[Piece], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        pieces = [piece async for piece in generation]
        ticking.cancel()
        return pieces, ticks

    feed(generation, pause=0.01)
    pieces, ticks = asyncio.run(read())
    assert pieces == PIECES
    assert ticks > 50


def test_an_error_comes_after_the_pieces_and_once(generation: Generation) -> None:
    feed(generation, EngineError("the GPU is gone")).join()
    pieces = []
    with pytest.raises(EngineError, match="the GPU is gone"):
        while True:
            pieces.append(next(generation))
    assert pieces == PIECES
    assert list(generation) == []


def test_a_consumer_whose_loop_is_gone_does_not_disturb(generation: Generation) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(generation), 0.01)

    asyncio.run(give_up())
    feed(generation).join()
    assert list(generation) == PIECES
