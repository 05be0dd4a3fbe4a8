"""Bad bodies, wrong keys, unknown routes and clients that leave: a clear answer, and nothing is lost."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import FakeEngine, Script, chat_tokenizer
from served import Served, serving, wait_for

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def _guarded() -> Iterator[Served]:
    options = {"api_key": "geheim-ü", "max_body_bytes": 2000, "timeout": 0.2, "max_tokens": 50}
    with serving(FakeEngine(["Hello."]), body_seconds=0.3, keep_alive=0.05, **options) as served:
        yield served


@pytest.fixture
def guarded(_guarded: Served) -> Iterator[Served]:
    """A server with a key and narrow limits."""
    _guarded.engine.say("Hello.")
    yield _guarded
    _guarded.check_alive()


def with_key(served: Served) -> dict[str, Any]:
    return {"Authorization": b"Bearer " + served.key.encode()}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "the body is not valid JSON"),
        (b'{"messages": [', 400, "the body is not valid JSON: EOF while parsing"),
        (b"hello", 400, "the body is not valid JSON"),
        (b'{"messages": "\xff\xfe"}', 400, "the body is not UTF-8: invalid start byte at byte 14"),
        (b'{"messages": "\\ud800"}', 400, "the body is not valid JSON"),
        (b"[" * 100_000, 400, "the body is not valid JSON"),
        (b'{"messages": [], "temperature": NaN}', 422, "temperature is nan"),
        (b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", 400, ""),
        (b"[1]", 422, "The body is a list, expected"),
        (b"{}", 422, "'messages' is missing."),
        (b'{"messages": null}', 400, "messages is missing"),
        (
            b'{"messages": [], "n": 99, "a": 1, "b": 1, "c": 1, "d": 1, "e": 1}',
            422,
            "There are 1 more problems.",
        ),
    ],
)
def test_a_body_that_is_none_is_a_sentence(served: Served, body: bytes, status: int, said: str) -> None:
    answer = served.post(CHAT, body)
    assert answer.status_code in (status, 422) if not said else answer.status_code == status
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in answer.text


def test_ten_megabytes_are_413_and_the_server_goes_on(served: Served) -> None:
    answer = served.post(CHAT, b" " * 10_000_000)
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == (
        "the body has 10,000,000 bytes, this server takes 8,000,000; send less."
    )
    with pytest.raises(openai.APIStatusError) as caught:
        served.client().chat.completions.create(
            model="v4graph", messages=[{"role": "user", "content": "x" * 9_000_000}]
        )
    assert caught.value.status_code == 413
    assert caught.value.body["code"] == "body_too_large"


def test_a_body_of_no_declared_length_is_counted_as_it_comes(served: Served) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    answer = served.post(CHAT, chunks())
    assert answer.status_code == 413
    assert "more than 8,000,000 bytes" in answer.json()["error"]["message"]


def test_a_body_that_stops_coming_is_408(guarded: Served) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {guarded.key}\r\nContent-Length: 100\r\n"
    )
    with guarded.raw(f"{head}\r\n{{".encode()) as connection:
        assert b" 408 " in connection.recv(10_000)


def test_bytes_that_are_no_http_are_refused(served: Served) -> None:
    with served.raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n") as connection:
        assert b" 400 " in connection.recv(10_000)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/chat/completion", "did you mean '/v1/chat/completions'?"),
        ("/v2/rank", "there are /v1/chat/completions, "),
        ("/v1/models/", "no model '' here"),
        ("/%ff%00", "no route"),
    ],
)
def test_an_unknown_route_names_the_known_ones(served: Served, path: str, said: str) -> None:
    answer = served.get(path)
    assert answer.status_code == 404
    assert said in answer.json()["error"]["message"]


def test_another_method_is_405_and_says_which(served: Served) -> None:
    answer = served.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert answer.json()["error"]["message"] == f"{CHAT} takes POST, not GET."


def test_a_wrong_key_is_401_and_the_right_one_goes_through(guarded: Served) -> None:
    assert guarded.post(CHAT, BODY).json()["error"]["message"].startswith("no API key; send the header")
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client("wrong").chat.completions.create(model="v4graph", messages=BODY["messages"])
    assert caught.value.code == "invalid_api_key"
    assert guarded.post(CHAT, b" " * 3_000_000).status_code == 401
    for path in ("/v1/models", "/metrics", "/stats"):
        assert guarded.get(path).status_code == 401
    for path in ("/", "/health"):
        assert guarded.get(path).status_code == 200
    assert guarded.post(CHAT, BODY, **with_key(guarded)).status_code == 200


def test_more_tokens_than_the_server_gives_are_refused_and_fewer_the_default(guarded: Served) -> None:
    answer = guarded.post(CHAT, {**BODY, "max_tokens": 51}, **with_key(guarded))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "max_tokens is 51, this server gives at most 50; lower it."
    guarded.post(CHAT, BODY, **with_key(guarded))
    assert guarded.engine.submitted[0][1].max_new_tokens == 50


def test_no_token_in_time_is_504_and_some_are_an_answer_that_was_cut(guarded: Served) -> None:
    guarded.engine.say(Script("Hello.", wait=5), Script("Hel", hangs=True))
    late = guarded.post(CHAT, BODY, **with_key(guarded))
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    cut = guarded.post(CHAT, BODY, **with_key(guarded)).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("Hel", "length")


def test_a_stream_that_waits_is_kept_alive_and_its_error_is_an_event(guarded: Served) -> None:
    guarded.engine.say(Script("Hello.", wait=5))
    text = guarded.post(CHAT, {**BODY, "stream": True}, **with_key(guarded)).text
    assert ": working\n\n" in text
    last = text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def leave(served: Served, body: dict[str, Any], seconds: float) -> None:
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    connection = served.raw(head + data)
    wait_for(lambda: served.engine.stats().running > 0)
    time.sleep(seconds)
    # Sent at once, as when a process dies.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait", [0.0, 30.0])
def test_a_client_that_goes_frees_its_slots(served: Served, stream: bool, wait: float) -> None:
    served.engine.say(Script("Hello.", wait=wait, hangs=True))
    leave(served, {**BODY, "stream": stream, "n": 3}, 0.05)
    wait_for(lambda: served.engine.stats().running == 0, 2)
    assert [one.finish for one in served.engine.generations] == ["cancelled"] * 3


def test_nothing_that_takes_long_runs_in_the_event_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, released = served.engine.tokenizer, threading.Event()
    encode = type(tokenizer).encode

    def slow(self: Any, text: str, *, start: bool = True) -> list[int]:
        assert released.wait(10)
        return encode(self, text, start=start)

    monkeypatch.setattr(type(tokenizer), "encode", slow)
    answers: list[int] = []
    threads = [
        threading.Thread(
            target=lambda path=path, body=body: answers.append(served.post(path, body).status_code)
        )
        for path, body in ((CHAT, BODY), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"}))
    ]
    for thread in threads:
        thread.start()
    assert served.get("/health").status_code == 200
    assert answers == []
    released.set()
    for thread in threads:
        thread.join(10)
    assert answers == [200, 200, 200]


def test_metrics_are_prometheus_and_stats_json(served: Served) -> None:
    served.post(CHAT, BODY)
    text = served.get("/metrics").text
    for line in (
        'v4graph_requests_total{finish="stop"} 1.0',
        "v4graph_generated_tokens_total 6.0",
        "v4graph_running 0.0",
        "v4graph_state_bytes 123456.0",
        "v4graph_prefix_cache_hits_total 1.0",
        "v4graph_prefix_cache_bytes 10.0",
        "# TYPE v4graph_time_to_first_token_seconds histogram",
        "# TYPE v4graph_time_per_output_token_seconds histogram",
    ):
        assert line in text
    stats = served.get("/stats").json()
    assert (stats["model"], stats["capacity"], stats["generated_tokens"]) == ("v4graph", 4096, 6)


def test_a_tokenizer_without_chat_tokens_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(["Hello."], tokenizer=chat_tokenizer(control=False))
    with serving(engine) as served, caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert served.post(CHAT, BODY).json()["choices"][0]["message"]["content"] == "Hello."
    warned = [record.getMessage() for record in caplog.records if "none for chat" in record.getMessage()]
    assert len(warned) == 1
    assert "<｜User｜>" in warned[0]
