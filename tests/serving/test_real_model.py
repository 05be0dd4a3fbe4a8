"""A real engine loop behind the server, with a random model whose tokenizer has the chat's control tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from engines import export_and_build
from fake_engine import chat_tokenizer
from openai import OpenAI
from served import Served, serving

from v4graph.checkpoint.init import init
from v4graph_export import ExportOptions
from v4graph_runtime import PrefixCache, Session
from v4graph_runtime.chat.format import END_THINK, EOS
from v4graph_runtime.serving import Engine

TOKENIZER = chat_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "tide": {"enum": ["high", "low"]},
        "hours": {"type": "array", "items": {"type": "boolean"}},
    },
    "required": ["tide", "hours"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    eos = TOKENIZER.core.token_to_id(EOS)
    init(tiny.config(vocab_size=TOKENIZER.vocab_size, eos_token_id=eos), folder / "checkpoint", 1)
    export_and_build(folder, folder / "checkpoint", ExportOptions(numerics="exact", max_seq_len=2048))
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Served]:
    with (
        Session(folder / "engine", folder / "checkpoint", batch=4) as session,
        Engine(session, TOKENIZER, cache=PrefixCache(interval=128)) as engine,
        serving(engine) as served,
    ):
        yield served


@pytest.fixture
def client(real: Served) -> OpenAI:
    return real.client()


def test_an_answer_behind_the_reasoning_matches_its_schema(real: Served, client: OpenAI) -> None:
    end = str(TOKENIZER.core.token_to_id(END_THINK))
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=real.service.options.model_name,
            messages=[{"role": "user", "content": "How is the tide?"}],
            reasoning_effort="high",
            response_format={"type": "json_schema", "json_schema": {"name": "tide", "schema": SCHEMA}},
            # The random model would think for ever.
            logit_bias={end: 6},
            max_completion_tokens=600,
            seed=3,
            stream=stream,
        )
        if stream:
            deltas = [event.choices[0].delta for event in answer if event.choices]
            reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
            content = "".join(delta.content or "" for delta in deltas)
        else:
            message = answer.choices[0].message
            assert answer.choices[0].finish_reason == "stop"
            assert answer.usage.completion_tokens_details.reasoning_tokens > 0
            whole = reasoning, content = message.reasoning_content, message.content
        assert reasoning
        assert set(json.loads(content)) == {"tide", "hours"}
    assert (reasoning, content) == whole


def test_a_second_turn_reads_the_first_from_the_cache(real: Served, client: OpenAI) -> None:
    messages = [{"role": "user", "content": "How is the tide? " * 20}]
    model = real.service.options.model_name
    first = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    turns = [*messages, first.choices[0].message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model=model, messages=turns, max_tokens=8, temperature=0)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0.5 * first.usage.prompt_tokens < cached <= second.usage.prompt_tokens
    real.check_alive()
