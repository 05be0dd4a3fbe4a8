"""Chats by OpenAI's own client against a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_engine import Script
from served import Served

from v4graph.errors import BusyError, SessionError
from v4graph_runtime.request import Constraint

USER = {"role": "user", "content": "Tide in Brest?"}
TIDE = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "Height of the tide",
        "parameters": {"type": "object", "properties": {"harbour": {"type": "string"}}},
    },
}
CALL = (
    'Let me see.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="tide">\n'
    '<｜DSML｜parameter name="harbour" string="true">Brest</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def ask(served: Served, *messages: Any, **options: Any) -> Any:
    return served.client().chat.completions.create(
        model="v4graph", messages=list(messages) or [USER], **options
    )


def test_an_answer_is_a_message_with_usage(served: Served) -> None:
    served.engine.say("Hello, wörld 😀.")
    answer = ask(served, {"role": "system", "content": "Be brief."}, USER)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, wörld 😀.")
    assert (choice.finish_reason, answer.object, answer.model) == ("stop", "chat.completion", "v4graph")
    prompt, _ = served.engine.submitted[0]
    assert prompt == "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Tide in Brest?<｜Assistant｜></think>"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == len("Hello, wörld 😀.".encode())
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens // 2
    assert usage.completion_tokens_details.reasoning_tokens == 0


def test_a_stream_joins_to_the_answer_and_ends_with_usage(served: Served) -> None:
    served.engine.say("Hello, wörld 😀.")
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Hello, wörld 😀."
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-2:] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("Hello, wörld 😀.".encode())
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_beside_the_content(served: Served, stream: bool) -> None:
    served.engine.say("Easy.</think>Paris.")
    if stream:
        chunks = ask(served, reasoning_effort="high", stream=True, stream_options={"include_usage": True})
        usage, reasoning, content = None, "", ""
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                reasoning += getattr(choice.delta, "reasoning_content", "")
                content += choice.delta.content or ""
    else:
        answer = ask(served, reasoning_effort="high")
        message, usage = answer.choices[0].message, answer.usage
        reasoning, content = message.reasoning_content, message.content
    assert (reasoning, content) == ("Easy.", "Paris.")
    assert usage is not None
    assert usage.completion_tokens_details.reasoning_tokens == len("Easy.") + 1
    assert usage.completion_tokens == len("Easy.") + 1 + len("Paris.")
    assert served.engine.submitted[0][0].endswith("<｜Assistant｜><think>")


@pytest.mark.parametrize(
    ("asked", "ending"),
    [
        ({}, "</think>"),
        ({"reasoning_effort": "none"}, "</think>"),
        ({"reasoning_effort": "minimal"}, "<think>"),
        ({"reasoning_effort": "max"}, "<think>"),
        ({"extra_body": {"thinking": {"type": "enabled"}}}, "<think>"),
        ({"extra_body": {"thinking": {"type": "disabled"}}, "reasoning_effort": "high"}, "</think>"),
        ({"extra_body": {"chat_template_kwargs": {"thinking": True}}}, "<think>"),
    ],
)
def test_each_way_to_ask_for_a_mode_chooses_it(served: Served, asked: dict[str, Any], ending: str) -> None:
    ask(served, **asked)
    prompt, _ = served.engine.submitted[0]
    assert prompt.endswith(f"<｜Assistant｜>{ending}")
    assert ("Absolute maximum" in prompt) == (asked.get("reasoning_effort") == "max")


def test_a_tool_is_called_and_its_result_answered(served: Served) -> None:
    served.engine.say(CALL, "5 metres.")
    answer = ask(served, tools=[TIDE])
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert call.function.name == "tide"
    assert json.loads(call.function.arguments) == {"harbour": "Brest", "days": 2}
    assert '"description": "Height of the tide"' in served.engine.submitted[0][0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "5.1"}
    again = ask(served, USER, choice.message.model_dump(exclude_none=True), result, tools=[TIDE])
    assert again.choices[0].message.content == "5 metres."
    assert CALL in served.engine.submitted[1][0]
    assert "<tool_result>5.1</tool_result>" in served.engine.submitted[1][0]


def test_a_call_streams_name_first_then_arguments(served: Served) -> None:
    served.engine.say(CALL)
    name, arguments, ids, content, finish = "", "", [], "", None
    for chunk in ask(served, tools=[TIDE], stream=True):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            ids += [call.id] if call.id else []
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, json.loads(arguments)) == ("tide", {"harbour": "Brest", "days": 2})
    assert (len(ids), content, finish) == (1, "Let me see.", "tool_calls")


def test_half_a_call_at_the_limit_is_shown_as_cut_off(served: Served) -> None:
    served.engine.say(CALL)
    (choice,) = ask(served, tools=[TIDE], max_tokens=96).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"harbour": "B')


def test_no_tool_is_shown_where_none_may_be_called(served: Served) -> None:
    ask(served, tools=[TIDE], tool_choice="none")
    assert "tide" not in served.engine.submitted[0][0]


def test_logprobs_name_text_bytes_and_the_likeliest(served: Served) -> None:
    served.engine.say("aä")
    answer = ask(served, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["a", "\ufffd", "\ufffd"]
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == "aä"
    assert [one.logprob for one in entries[0].top_logprobs] == [-0.25, -2.0, -9999.0]
    streamed = [
        entry
        for chunk in ask(served, logprobs=True, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in entries]
    assert streamed[0].top_logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_have_seeds_of_their_own(served: Served, stream: bool) -> None:
    served.engine.say("one", Script("two", pace=0.01), "three")
    answer = ask(served, n=3, seed=7, stream=stream)
    texts = ["", "", ""]
    if stream:
        for chunk in answer:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
        assert answer.usage.prompt_tokens == served.engine.generations[0].prompt_tokens
        assert answer.usage.completion_tokens == len("onetwothree")
    assert texts == ["one", "two", "three"]
    assert [options.sampling.seed for _, options in served.engine.submitted] == [7, 8, 9]


def test_every_field_reaches_the_engine(served: Served) -> None:
    ask(
        served,
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        seed=3,
        stop=["\n", "END"],
        logit_bias={"17": -100},
        user="somebody",
        metadata={"a": "b"},
        parallel_tool_calls=True,
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [9],
            "structured_outputs": {"regex": "[ab]+"},
        },
    )
    _, options = served.engine.submitted[0]
    sampling = options.sampling
    assert (options.max_new_tokens, options.stop) == (5, ("\n", "END"))
    assert options.stop_ids == (served.engine.eos, 9)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, {17: -100.0})
    assert options.constraint == Constraint("regex", "[ab]+")
    assert options.special_tokens


def test_defaults_are_openais_and_what_is_left_of_the_context(served: Served) -> None:
    ask(served)
    _, options = served.engine.submitted[0]
    assert (options.sampling.temperature, options.sampling.seed) == (1.0, None)
    assert options.max_new_tokens == 4096 - served.engine.generations[0].prompt_tokens + 1
    assert (options.stop_ids, options.logprobs, options.constraint) == (None, None, None)
    ask(served, extra_body={"ignore_eos": True})
    assert served.engine.submitted[1][1].stop_ids == ()


@pytest.mark.parametrize(("effort", "after"), [("none", ""), ("high", "</think>")])
def test_a_json_schema_is_in_the_prompt_and_binds_the_answer(served: Served, effort: Any, after: str) -> None:
    served.engine.say('</think>{"a": 1}' if after else '{"a": 1}')
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    answer = ask(served, response_format=wanted, reasoning_effort=effort)
    assert json.loads(answer.choices[0].message.content) == {"a": 1}
    prompt, options = served.engine.submitted[0]
    assert json.dumps(schema) in prompt
    assert options.constraint == Constraint("json_schema", json.dumps(schema), after)


def test_any_json_object_can_be_asked_for(served: Served) -> None:
    ask(served, response_format={"type": "json_object"})
    assert served.engine.submitted[0][1].constraint == Constraint("json_object")
    ask(served, response_format={"type": "text"})
    assert served.engine.submitted[1][1].constraint is None


def test_an_answer_goes_on_with_a_prefix(served: Served) -> None:
    ask(served, USER, {"role": "assistant", "content": "The tide", "prefix": True}, reasoning_effort="high")
    assert served.engine.submitted[0][0].endswith("</think>The tide")


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"temperature": -1}, openai.UnprocessableEntityError, "temperature is -1, expected greater than"),
        ({"max_tokens": 0}, openai.UnprocessableEntityError, "max_tokens is 0, expected greater"),
        ({"max_tokens": -5, "n": "2"}, openai.UnprocessableEntityError, "n is '2', expected a valid integer"),
        (
            {"extra_body": {"tempreature": 1}},
            openai.UnprocessableEntityError,
            "Unknown field 'tempreature'; did you mean 'temperature'?",
        ),
        ({"top_logprobs": 2}, openai.UnprocessableEntityError, "top_logprobs is for answers with"),
        ({"stop": ["a", ""]}, openai.UnprocessableEntityError, "stop.1 is ''"),
        ({"tool_choice": "required"}, openai.BadRequestError, "a 'tool_choice' that forces a call is not"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "give 'tools' instead"),
        ({"max_tokens": 5000}, openai.BadRequestError, "the context holds 4096 tokens"),
        ({"logit_bias": {"9999": 1}}, openai.BadRequestError, "token 9999 does not exist"),
        ({"model": "v4grph"}, openai.NotFoundError, "did you mean 'v4graph'?"),
        ({"messages": []}, openai.BadRequestError, "messages is empty"),
        ({"messages": [{"role": "usr", "content": ""}]}, openai.BadRequestError, "did you mean 'user'?"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]},
            openai.BadRequestError,
            "a part of type 'image_url'",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "."}]},
            openai.BadRequestError,
            "'prefix': true",
        ),
        (
            {"tools": [TIDE], "response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "cannot hold tool calls",
        ),
    ],
)
def test_refusals_are_sentences(served: Served, fields: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(kind) as caught:
        served.client().chat.completions.create(**{"model": "v4graph", "messages": [USER], **fields})
    assert said in caught.value.body["message"]
    assert set(caught.value.body) == {"message", "type", "param", "code"}
    assert served.engine.generations == []


def test_a_prompt_over_capacity_says_so_in_openais_code(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(served, {"role": "user", "content": "x" * 5000})
    assert caught.value.code == "context_length_exceeded"
    assert "the prompt has 5004 tokens" in caught.value.body["message"]


def test_a_full_queue_is_429_with_when_to_come_again(served: Served) -> None:
    served.engine.busy = BusyError("256 requests are waiting.")
    with pytest.raises(openai.RateLimitError) as caught:
        ask(served, n=2)
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.code == "queue_full"


def test_an_engine_that_refuses_is_400_and_one_that_fails_500_without_its_words(served: Served) -> None:
    served.engine.busy = SessionError("the schema has no such type.")
    with pytest.raises(openai.BadRequestError, match="no such type"):
        ask(served)
    served.engine.say(Script("Hel", error=RuntimeError("secret path")))
    with pytest.raises(openai.InternalServerError) as caught:
        ask(served)
    assert caught.value.code == "internal_error"
    assert "secret" not in caught.value.response.text


def test_a_failure_inside_a_stream_is_its_last_event(served: Served) -> None:
    served.engine.say(Script("Hel", error=RuntimeError("secret path")))
    text = ""
    with pytest.raises(openai.APIError, match=r"internal error [0-9a-f]+; the server's log"):
        for chunk in ask(served, stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "Hel"


def test_models_are_listed(served: Served) -> None:
    client = served.client()
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("v4graph", "v4graph")
    assert client.models.retrieve("v4graph").id == "v4graph"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt' here"):
        client.models.retrieve("gpt")
