"""The older API, by OpenAI's own client, and the routes that count tokens."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from served import Served


def complete(served: Served, prompt: Any = "In", **options: Any) -> Any:
    return served.client().completions.create(model="v4graph", prompt=prompt, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_text_goes_on_without_a_chats_format(served: Served, stream: bool) -> None:
    served.engine.say(" the beginning<｜User｜>")
    answer = complete(served, stream=stream)
    text = "".join(one.choices[0].text for one in (answer if stream else [answer]))
    assert text == " the beginning"
    assert served.engine.submitted[0][0] == "<｜begin▁of▁sentence｜>In"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        (["In", "On"], ["<｜begin▁of▁sentence｜>In", "<｜begin▁of▁sentence｜>On"]),
        ([40, 77], None),
        ([[40], [77, 78]], None),
    ],
)
def test_each_form_of_a_prompt(served: Served, prompt: Any, read: list[str] | None) -> None:
    served.engine.say("a", "b", "c", "d")
    answer = complete(served, prompt, n=2)
    count = 2 * (len(prompt) if isinstance(prompt[0], str | list) else 1)
    assert [choice.index for choice in answer.choices] == list(range(count))
    assert [choice.text for choice in answer.choices] == list("abcd"[:count])
    prompts = [text for text, _ in served.engine.submitted]
    assert prompts[::2] == prompts[1::2]
    assert read is None or prompts[::2] == read
    assert answer.usage.prompt_tokens == sum(one.prompt_tokens for one in served.engine.generations[::2])


def test_logprobs_have_offsets_and_a_name_for_each_token(served: Served) -> None:
    served.engine.say("aäb")
    logprobs = complete(served, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa4", "b"]
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.token_logprobs == [-0.25] * 4
    assert logprobs.top_logprobs[0]["a"] == -0.25
    assert len(logprobs.top_logprobs[1]) == 2


def test_the_limit_of_tokens_is_kept_and_said(served: Served) -> None:
    served.engine.say("abcdef")
    (choice,) = complete(served, max_tokens=3).choices
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert complete(served, max_tokens=4094).choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"echo": True}, openai.BadRequestError, "'echo' is not supported; leave it out."),
        ({"suffix": "end"}, openai.BadRequestError, "'suffix' is not supported"),
        ({"best_of": 4}, openai.BadRequestError, "'best_of' is not supported"),
        ({"prompt": 5}, openai.UnprocessableEntityError, "prompt: expected a text, a list of texts"),
        ({"prompt": []}, openai.UnprocessableEntityError, "prompt: expected a text"),
        ({"prompt": [-1]}, openai.UnprocessableEntityError, "prompt: expected a text"),
        ({"prompt": ["a"] * 65}, openai.UnprocessableEntityError, "at most 64"),
        ({"prompt": [[99999]]}, openai.BadRequestError, "token 99999 does not exist"),
        ({"prompt": "x" * 5000}, openai.BadRequestError, "the context holds 4096"),
        ({"max_tokens": 4096}, openai.BadRequestError, "lower max_tokens"),
        ({"logprobs": 50}, openai.UnprocessableEntityError, "logprobs is 50, expected less than"),
        (
            {"extra_body": {"structured_outputs": {}}},
            openai.UnprocessableEntityError,
            "expected exactly one of 'json', 'regex' and 'json_object'",
        ),
        ({"extra_body": {"stream_options": {}}}, openai.UnprocessableEntityError, "'stream': true"),
    ],
)
def test_refusals_are_sentences(served: Served, fields: dict[str, Any], kind: Any, said: str) -> None:
    with pytest.raises(kind) as caught:
        served.client().completions.create(**{"model": "v4graph", "prompt": "In", **fields})
    assert said in caught.value.body["message"]
    assert served.engine.generations == []


def test_best_of_as_many_as_asked_for_asks_for_nothing(served: Served) -> None:
    assert len(complete(served, n=2, best_of=2, echo=False, suffix="").choices) == 2


def test_tokens_there_and_back(served: Served) -> None:
    counted = served.post("/tokenize", {"prompt": "Hä<｜User｜>"}).json()
    assert counted["count"] == len(counted["tokens"]) == 5
    assert counted["max_model_len"] == 4096
    again = served.post("/detokenize", {"tokens": counted["tokens"]}).json()
    assert again == {"prompt": "<｜begin▁of▁sentence｜>Hä<｜User｜>"}
    bare = served.post("/tokenize", {"prompt": "Hä", "add_special_tokens": False}).json()
    assert bare["count"] == 3


def test_a_conversation_is_counted_as_it_would_be_asked(served: Served) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"messages": messages, "reasoning_effort": "high"}
    counted = served.post("/tokenize", body).json()
    text = served.post("/detokenize", {"tokens": counted["tokens"]}).json()["prompt"]
    assert text == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>"
    assert served.post("/tokenize", {}).status_code == 422
    assert served.post("/detokenize", {"tokens": [99999]}).status_code == 400
