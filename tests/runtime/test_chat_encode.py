"""Prompts are the official encoder's to the byte; what a message means is never dropped unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from v4graph_runtime import Tokenizer, chat

OFFICIAL = Path(__file__).parents[3] / "shared" / "golden" / "encoding"
GOLDEN = Path(__file__).parents[1] / "golden"

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


def user(content: str = "Q", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: str = "A", reasoning: str = "R", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


def calls(*ids: str) -> dict[str, Any]:
    return assistant("", tool_calls=[{"id": i, "function": {"name": i, "arguments": "{}"}} for i in ids])


def result(call: str, content: str = "") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": content or f"of {call}"}


@pytest.mark.parametrize("number", [1, 2])
def test_official_cases(number: int) -> None:
    if not OFFICIAL.is_dir():
        pytest.skip("the official encoding cases are not beside this checkout")
    messages = json.loads((OFFICIAL / f"test_input_{number}.json").read_text("utf-8"))
    expected = (OFFICIAL / f"test_output_{number}.txt").read_text("utf-8")
    assert chat.encode(messages, "thinking") == expected


def test_official_think_max_text() -> None:
    if not OFFICIAL.is_dir():
        pytest.skip("the official encoding cases are not beside this checkout")
    effort = (OFFICIAL / "reasoning_effort_max.txt").read_text("utf-8")
    assert chat.encode([user()], "max") == f"{BOS}{effort}<｜User｜>Q<｜Assistant｜><think>"


def test_tools_calls_results_response_format_and_think_max() -> None:
    conversation = json.loads((GOLDEN / "chat_prompt.json").read_text("utf-8"))
    assert chat.encode(conversation, "max") == (GOLDEN / "chat_prompt.txt").read_text("utf-8")


SYSTEM = {"role": "system", "content": "S"}
DEVELOPER = {"role": "developer", "content": "D"}
REMINDER = {"role": "latest_reminder", "content": "M"}


@pytest.mark.parametrize(
    ("mode", "messages", "prompt"),
    [
        ("chat", [user()], "<｜User｜>Q<｜Assistant｜></think>"),
        ("thinking", [SYSTEM, user()], "S<｜User｜>Q<｜Assistant｜><think>"),
        ("chat", [user(), assistant()], f"<｜User｜>Q<｜Assistant｜></think>A{EOS}"),
        ("thinking", [user(), assistant()], f"<｜User｜>Q<｜Assistant｜><think>R</think>A{EOS}"),
        ("thinking", [user(), assistant(wo_eos=True)], "<｜User｜>Q<｜Assistant｜><think>R</think>A"),
        ("chat", [user(), assistant(prefix=True)], "<｜User｜>Q<｜Assistant｜></think>A"),
        ("chat", [DEVELOPER], "<｜User｜>D<｜Assistant｜></think>"),
        ("chat", [user("1"), user("2")], "<｜User｜>1\n\n2<｜Assistant｜></think>"),
        ("chat", [user(content=[{"type": "text", "text": "1"}, {"type": "text", "text": "2"}])],
         "<｜User｜>1\n\n2<｜Assistant｜></think>"),
        # A reminder stands behind what asks for the assistant, where the model was trained to see it.
        ("chat", [user(), REMINDER], "<｜User｜>Q<｜Assistant｜></think><｜latest_reminder｜>M"),
        ("chat", [SYSTEM, REMINDER, user()], "S<｜latest_reminder｜>M<｜User｜>Q<｜Assistant｜></think>"),
    ],
)  # fmt: skip
def test_every_role(mode: chat.Mode, messages: list[Any], prompt: str) -> None:
    assert chat.encode(messages, mode) == BOS + prompt


def test_reasoning_before_the_last_user_message_is_dropped_and_developers_with_it() -> None:
    messages = [user("1"), DEVELOPER, assistant("a", "old"), user("2"), assistant("b", "new")]
    short = chat.encode(messages, "thinking")
    assert short == (
        f"{BOS}<｜User｜>1<｜Assistant｜></think>a{EOS}<｜User｜>2<｜Assistant｜><think>new</think>b{EOS}"
    )
    whole = chat.encode(messages, "thinking", drop_thinking=False)
    assert "<think>old</think>a" in whole and "<｜User｜>D" in whole


def test_nothing_is_dropped_where_there_are_tools() -> None:
    messages = [user("1"), assistant("a", "old"), user("2")]
    assert "<think>old</think>a" in chat.encode(messages, "thinking", tools=[TOOL])
    developer = {**DEVELOPER, "tools": [TOOL]}
    assert "<think>old</think>a" in chat.encode([developer, *messages], "thinking")


@pytest.mark.parametrize(
    ("task", "prompt"),
    [("action", "<｜User｜>Q<｜Assistant｜>{}<｜action｜>"), ("query", "<｜User｜>Q<｜query｜>"),
     ("authority", "<｜User｜>Q<｜authority｜>"), ("domain", "<｜User｜>Q<｜domain｜>"),
     ("title", "<｜User｜>Q<｜title｜>"), ("read_url", "<｜User｜>Q<｜read_url｜>")],
)  # fmt: skip
def test_quick_instructions_and_their_output_without_thinking(task: str, prompt: str) -> None:
    for mode, think in (("chat", "</think>"), ("thinking", "<think>")):
        asked = chat.encode([user(task=task)], mode)  # type: ignore[arg-type]
        assert asked == BOS + prompt.format(think)
        answered = chat.encode([user(task=task), assistant("X")], mode)  # type: ignore[arg-type]
        assert answered == f"{asked}X{EOS}"


def test_a_title_is_asked_for_behind_the_answer() -> None:
    prompt = chat.encode([user(), assistant(task="title"), assistant("T")])
    assert prompt == f"{BOS}<｜User｜>Q<｜Assistant｜></think>A{EOS}<｜title｜>T{EOS}"


def test_results_are_joined_with_the_user_and_sorted_as_the_calls() -> None:
    messages = [calls("a", "b"), result("b"), user("x"), result("a"), user("y")]
    prompt = chat.encode([user(), *messages])
    tail = prompt.partition(EOS)[2]
    assert tail == (
        "<｜User｜><tool_result>of a</tool_result>\n\nx\n\n<tool_result>of b</tool_result>\n\ny"
        "<｜Assistant｜></think>"
    )


def test_results_and_calls_may_have_no_ids() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    prompt = chat.encode([user(), assistant(tool_calls=[call, call]), *results])
    assert "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>" in prompt


def test_tools_go_on_the_system_message_or_a_new_one() -> None:
    alone = chat.encode([user()], tools=[TOOL])
    assert alone.startswith(f"{BOS}\n\n## Tools\n\n")
    beside = chat.encode({"messages": [SYSTEM, user()], "tools": [TOOL]})
    assert beside == alone.replace(BOS, f"{BOS}S")
    assert beside == chat.encode([{**SYSTEM, "tools": [TOOL]}, user()])
    assert chat.encode({"messages": [user()], "tools": None}) == chat.encode([user()])


def test_a_parsed_message_is_taken_as_it_is() -> None:
    message = chat.Message("A", "R", (chat.ToolCall("f", '{"x": 1}'),))
    same = chat.encode([user(), message.to_dict()], "thinking")
    assert chat.encode([user(), message], "thinking") == same
    assert '<think>R</think>A\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">' in same


def test_keys_of_other_programs_are_passed_over() -> None:
    more = {"name": "Ann", "refusal": None, "annotations": [], "mask": 1, "timestamp": 3, "tool_calls": None}
    assert chat.encode([user(**more)]) == chat.encode([user()])


def test_control_tokens_that_a_tokenizer_lacks_are_named(byte_tokenizer: Tokenizer) -> None:
    prompt = chat.encode([user()])
    assert chat.missing_tokens(prompt, byte_tokenizer) == (BOS, "<｜User｜>", "<｜Assistant｜>", "</think>")
