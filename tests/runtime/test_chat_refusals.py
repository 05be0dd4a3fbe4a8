"""Messages that cannot be encoded as they are meant end in one sentence that says which and why."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4graph.errors import ChatError
from v4graph_runtime import chat

Q = {"role": "user", "content": "Q"}
TOOL = {"type": "function", "function": {"name": "now"}}
DEEP: list[Any] = []
DEEP.append(DEEP)


def asks(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def one(**keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Q", **keys}]


def call(**keys: Any) -> list[dict[str, Any]]:
    return [Q, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}", **keys}}]}]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ("hello", "messages is 'hello', expected a list of messages, or an object with 'messages'."),
        (None, "messages is missing, expected a list"),
        ({"message": [Q]}, "the conversation: unknown key 'message'; did you mean 'messages'? Rename"),
        ({"tools": [TOOL]}, "messages is missing, expected"),
        ([], "messages is empty; give at least one, as {"),
        (["hello"], r"messages[0] is 'hello', expected an object with 'role' and 'content'."),
        ([{"content": "Q"}], "messages[0]: unknown role None; use one of system, user, assistant, tool,"),
        ([Q, {"role": "asistant"}], "messages[1]: unknown role 'asistant'; did you mean 'assistant'? Use on"),
        ([{"role": ["user"]}], "messages[0]: unknown role ['user']; use one of"),
        ([{"role": "user"}], "messages[0]: no 'content', which role user needs; give '' for none."),
        ([{"role": "system"}], "messages[0]: no 'content' or 'tools' or 'response_format', which"),
        ([Q, {"role": "assistant"}], "messages[1]: no 'content' or 'tool_calls' or 'reasoning_content', wh"),
        ([{"role": "developer", "content": ""}], "messages[0]: a developer message without content"),
        (one(content=3), "messages[0].content is 3, expected a string, or a list of {'type': 'text'"),
        (one(content=["a"]), "messages[0].content[0] is 'a', expected an object {'type': 'text'"),
        (one(content=[{"type": "text"}]), "messages[0].content[0].text is missing, expected a string."),
        (one(content=[{"type": "image_url"}]), "messages[0].content[0]: a part of type 'image_url'; the mod"),
        (one(content="a\ud83e"), "messages[0]: U+D83E in its text is half of a character; replace it."),
        (one(contents="a"), "messages[0]: unknown key 'contents'; did you mean 'content'? Rename or remove"),
        (one(tools=[TOOL]), "messages[0]: 'tools' on a message of role user; it belongs on one of role syst"),
        (one(tool_calls=[1]), "'tool_calls' on a message of role user; it belongs on one of role assistant."),
        (one(task="titel"), "messages[0]: unknown task 'titel'; did you mean 'title'? Use one of action,"),
        (one(task=1), "messages[0].task is 1, expected a string."),
        ([Q, {**Q, "task": "title"}], "messages[1]: a task on a message that is joined to the one before it"),
        ([Q, {"role": "assistant", "content": "", "wo_eos": "no"}], "messages[1].wo_eos is 'no', expected t"),
        ([Q, {"role": "assistant", "tool_calls": {"f": 1}}], "messages[1].tool_calls is an object, expected"),
        ([Q, {"role": "assistant", "tool_calls": [{}]}], "messages[1].tool_calls[0].function is missing, ex"),
        (call(name=""), "messages[1].tool_calls[0].function.name is empty; give the function a name."),
        (call(name=None), "messages[1].tool_calls[0].function.name is missing, expected a string."),
        (call(arguments=[1]), "tool_calls[0].function.arguments is a list, expected a JSON object, as text"),
        (call(arguments={"a": {1}}), "tool_calls[0].function.arguments cannot be written as JSON (Object of"),
        (call(arguments='{"a": "\\ud83e"}'), "messages[1]: U+D83E in its text is half of a character"),
        ([{"role": "system", "content": "", "tools": {}, "response_format": 1}], "response_format is 1, exp"),
        ([{"role": "system", "content": "", "tools": "now"}], "messages[0].tools is 'now', expected a list"),
        ([{"role": "system", "tools": [{"name": "f"}]}], "messages[0].tools[0].function is missing, expecte"),
        ([{"role": "system", "tools": [{"function": {"name": "f", "x": {1}}}]}], "messages[0].tools[0] cann"),
        ([{"role": "system", "tools": [{"function": {"name": "f", "x": DEEP}}]}], "messages[0].tools[0] can"),
        ({"messages": [{"role": "system", "content": "", "tools": [TOOL]}], "tools": [TOOL]},
         "tools: given twice, in messages[0] and for the conversation; leave one out."),
        ([Q, {"role": "tool", "content": "1"}], "messages[1]: a tool's result without a call; put the assis"),
        ([Q, asks("call_1"), {"role": "tool", "tool_call_id": "call_2", "content": ""}],
         "messages[2]: tool_call_id 'call_2' is no call of the last assistant message; did you mean 'call_1"),
        ([Q, asks("a"), {"role": "tool", "tool_call_id": 1, "content": ""}], "messages[2].tool_call_id is 1"),
        ([Q, asks("a"), {"role": "tool", "tool_call_id": "a"}], "messages[2]: no 'content', wh"),
    ],
)  # fmt: skip
def test_bad_messages_are_refused_in_a_sentence(messages: Any, sentence: str) -> None:
    with pytest.raises(ChatError) as error:
        chat.encode(messages)
    assert sentence in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_tools_beside_and_in_the_conversation_are_refused() -> None:
    with pytest.raises(ChatError, match="tools: given twice, in the conversation and beside it"):
        chat.encode({"messages": [Q], "tools": [TOOL]}, tools=[TOOL])


@pytest.mark.parametrize("use", [lambda mode: chat.encode([Q], mode), chat.Parser])
def test_an_unknown_mode_answers_with_the_nearest(use: Any) -> None:
    with pytest.raises(
        ChatError, match=r"unknown mode 'think'; did you mean 'thinking'\? Use one of chat, th"
    ):
        use("think")


def test_a_completion_is_text() -> None:
    with pytest.raises(ChatError, match="a completion is a list, expected text; decode its tokens first"):
        chat.parse([1, 2])  # type: ignore[arg-type]


WORDS = [
    "role",
    "content",
    "user",
    "assistant",
    "tool",
    "tool_calls",
    "function",
    "arguments",
    "system",
    "task",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.floats()
    | st.sampled_from(WORDS)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": JSON},
    optional={"tool_calls": JSON, "tools": JSON, "tool_call_id": JSON, "response_format": JSON, "task": JSON},
)


@settings(deadline=None)
@given(given_messages=st.lists(MESSAGE | JSON, max_size=4) | JSON)
def test_any_json_is_encoded_or_refused(given_messages: Any) -> None:
    with contextlib.suppress(ChatError):
        assert chat.encode(given_messages).encode()
