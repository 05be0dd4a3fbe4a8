"""`v4graph serve` as a process, with a real engine behind it."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import Result
from openai import OpenAI
from serve_process import serve_process

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def served(engine: Path, checkpoint: Path) -> Iterator[OpenAI]:
    options = ("--slots", 2, "--max-waiting", 2, "--model-name", "tiny", "--prefill-tokens", 16)
    with serve_process(engine, checkpoint, "--threads", 1, *options) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=30)


def stats(client: OpenAI) -> dict[str, Any]:
    answer: dict[str, Any] = client.get("../stats", cast_to=object)  # type: ignore[assignment]
    return answer


def idle(client: OpenAI) -> bool:
    deadline = time.monotonic() + 10
    while (now := stats(client))["running"] or now["waiting"]:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return True


def test_it_goes_on_as_run_does(served: OpenAI, cli: Cli, engine: Path, checkpoint: Path) -> None:
    arguments = ("--prompt", "In the beginning", "--max-new-tokens", 8, "--json")
    alone = json.loads(cli("run", engine, "--checkpoint", checkpoint, *arguments).stdout)
    for stream in (False, True):
        answer = served.completions.create(
            model="tiny", prompt="In the beginning", max_tokens=8, temperature=0, stream=stream
        )
        pieces = answer if stream else [answer]
        assert "".join(one.choices[0].text for one in pieces) == alone["text"]


def test_equal_seeds_give_equal_choices_and_logprobs_are_the_models(served: OpenAI) -> None:
    options = {"max_tokens": 6, "seed": 5, "logprobs": 3}
    first, second = (served.completions.create(model="tiny", prompt="And", **options) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    logprobs = first.choices[0].logprobs
    assert len(logprobs.tokens) == first.usage.completion_tokens
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert chosen <= max(top.values()) <= 0
    together = served.completions.create(model="tiny", prompt="And", n=3, **options)
    assert together.choices[0].text == first.choices[0].text
    assert idle(served)


def test_a_chat_of_a_model_that_knows_none_still_answers(served: OpenAI) -> None:
    answer = served.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
    )
    assert answer.usage.completion_tokens <= 4
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_a_regular_expression_binds_the_output(served: OpenAI) -> None:
    answer = served.completions.create(
        model="tiny", prompt="In", max_tokens=20, extra_body={"structured_outputs": {"regex": "[0-9]{3}!"}}
    )
    text = answer.choices[0].text
    assert len(text) == 4
    assert text[:3].isdecimal()
    assert text[3] == "!"
    with pytest.raises(openai.BadRequestError):
        served.completions.create(
            model="tiny", prompt="In", extra_body={"structured_outputs": {"regex": "("}}
        )


def test_a_prompt_over_capacity_and_a_full_queue_are_refused(served: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.completions.create(model="tiny", prompt="In the beginning " * 100)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.RateLimitError) as busy:
        served.completions.create(model="tiny", prompt="In", n=5, max_tokens=100)
    assert busy.value.code == "queue_full"
    assert idle(served)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_slots(served: OpenAI, stream: bool) -> None:
    body = {"prompt": "In", "n": 4, "max_tokens": 120, "stream": stream, "ignore_eos": True}
    data = json.dumps(body).encode()
    before = stats(served)["finished"].get("cancelled", 0)
    with socket.create_connection((served.base_url.host, served.base_url.port or 0)) as connection:
        lines = ("POST /v1/completions HTTP/1.1", "Host: x", "Authorization: Bearer secret")
        head = "\r\n".join((*lines, f"Content-Length: {len(data)}", "", ""))
        connection.sendall(head.encode() + data)
        while not stats(served)["running"]:
            time.sleep(0.005)
    assert idle(served)
    assert stats(served)["finished"]["cancelled"] > before


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_what_runs_with_its_answer(
    engine: Path, checkpoint: Path, kind: signal.Signals
) -> None:
    options = ("--threads", 1, "--slots", 1, "--prefix-cache", engine.parent / "cache")
    with serve_process(engine, checkpoint, *options) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0, timeout=30)
        answers: list[Any] = []

        def ask() -> None:
            answers.append(client.completions.create(model="engine", prompt="In", max_tokens=100))

        asking = threading.Thread(target=ask)
        asking.start()
        while not stats(client)["running"] and not answers:
            time.sleep(0.005)
        server.process.send_signal(kind)
        server.process.wait(30)
        log, url = server.log(), server.url
        asking.join(10)
    assert server.process.returncode == 0, log
    assert answers[0].choices[0].finish_reason in ("length", "stop")
    assert f"engine at {url} (API at {url}/v1): 1 slots of 128 tokens" in log
    assert "Traceback" not in log


def test_a_port_in_use_is_one_line(cli: Cli, engine: Path, checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = cli("serve", engine, "--checkpoint", checkpoint, "--port", port)
    assert result.exit_code == 2
    assert f"Error: 127.0.0.1:{port} cannot be listened on (Address already in use)" in result.stderr
