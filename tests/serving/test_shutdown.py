"""A shutdown takes nothing new, finishes what runs, and returns what there is of the rest."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from fake_engine import FakeEngine, Script
from served import serving, wait_for

from v4graph.errors import EngineError
from v4graph_runtime.serving.server import bind, url_of

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


def shut_down(engine: FakeEngine, body: dict[str, Any], drain: float) -> tuple[int, str, float]:
    """Ask, stop the server while the answer is on its way, and return what came of it."""
    answers: list[tuple[int, str]] = []
    with serving(engine, drain=drain) as served:

        def ask() -> None:
            answer = served.post(CHAT, body)
            answers.append((answer.status_code, answer.text))

        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: engine.stats().generated_tokens > 0 or engine.scripts[0].wait > 0)
        wait_for(lambda: engine.stats().running > 0)
        began = time.perf_counter()
        served.server.stop()
        asking.join(20)
    return *answers[0], time.perf_counter() - began


def test_what_runs_is_finished() -> None:
    status, text, _ = shut_down(FakeEngine([Script("Hello.", pace=0.1)]), BODY, drain=10)
    assert status == 200
    assert '"content":"Hello."' in text
    assert '"finish_reason":"stop"' in text


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_finish_in_time_is_returned_as_it_is(stream: bool) -> None:
    engine = FakeEngine([Script("Hel", hangs=True)])
    status, text, seconds = shut_down(engine, {**BODY, "stream": stream}, drain=0.2)
    assert status == 200
    assert '"finish_reason":"length"' in text
    assert seconds < 5
    assert text.endswith("data: [DONE]\n\n") == stream


def test_what_has_no_token_yet_is_503() -> None:
    status, text, _ = shut_down(FakeEngine([Script("Hello.", wait=30)]), BODY, drain=0.1)
    assert status == 503
    assert "shutting down" in text


def test_a_body_on_its_way_is_not_waited_for() -> None:
    with serving(FakeEngine(["Hello."]), drain=5) as served:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"
        with served.raw(head) as connection:
            wait_for(lambda: bool(served.service.arriving))
            began = time.perf_counter()
            served.server.stop()
            assert b"503 Service Unavailable" in connection.recv(1 << 16)
    assert time.perf_counter() - began < 3


def test_a_second_signal_does_not_wait() -> None:
    engine = FakeEngine([Script("Hel", hangs=True)])
    with serving(engine, drain=60) as served:
        asking = threading.Thread(target=lambda: served.post(CHAT, BODY))
        asking.start()
        wait_for(lambda: engine.stats().running > 0)
        began = time.perf_counter()
        served.server.handle_exit(15, None)
        served.server.handle_exit(2, None)
        asking.join(20)
    assert time.perf_counter() - began < 5


def test_a_port_in_use_is_a_sentence_and_one_is_found_for_0() -> None:
    with bind("127.0.0.1", 0) as listener:
        url = url_of(listener)
        listener.listen()
        port = int(url.rpartition(":")[2])
        assert port > 0
        with pytest.raises(
            EngineError, match=r"cannot be listened on .*; choose another with --host and --port"
        ):
            bind("127.0.0.1", port)
    with pytest.raises(EngineError, match="cannot be listened on"):
        bind("no.such.host.invalid", 0)
