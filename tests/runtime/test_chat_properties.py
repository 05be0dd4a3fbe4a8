"""Any conversation comes back from its prompt; any text is read, the same in any pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from completions import EOS, MARKUP, VALID, check, spoilt, streamed
from hypothesis import given, settings
from hypothesis import strategies as st

from v4graph_runtime import chat

# Text that is no markup; half of a character has no UTF-8.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="｜"), max_size=30)
TEXT = (PLAIN | st.sampled_from(["\n\n", "<", "a\n", "</", '"', "{}", "中文"])).filter(
    lambda text: not any(mark in text for mark in MARKUP)
)
NAME = st.text("abc_-.>< é", min_size=1, max_size=8).map(str.strip).filter(bool)
VALUE = st.recursive(
    TEXT | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CALL = st.builds(
    lambda name, arguments: chat.ToolCall(name, json.dumps(arguments, ensure_ascii=False)),
    NAME,
    st.dictionaries(NAME, VALUE, max_size=3),
)
ANSWER = st.builds(
    chat.Message, content=TEXT, reasoning=TEXT, tool_calls=st.lists(CALL, max_size=3).map(tuple)
)
MODES = st.sampled_from(["chat", "thinking", "max"])


def said(message: chat.Message, mode: str) -> tuple[Any, ...]:
    """What a prompt of a mode holds of a message, arguments by value."""
    calls = [(call.name, json.loads(call.arguments)) for call in message.tool_calls]
    return message.content, "" if mode == "chat" else message.reasoning, calls


@settings(deadline=None)
@given(turns=st.lists(st.tuples(TEXT, ANSWER), min_size=1, max_size=4), mode=MODES, seed=st.integers())
def test_answers_come_back_from_the_prompt(
    turns: list[tuple[str, chat.Message]], mode: chat.Mode, seed: int
) -> None:
    messages: list[Any] = [{"role": "system", "content": "S"}]
    for question, answer in turns:
        if calls := messages[-1].get("tool_calls", []):
            messages += [{"role": "tool", "content": question}] * len(calls)
        else:
            messages.append({"role": "user", "content": question})
        prompt = chat.encode(messages, mode, drop_thinking=False)
        messages.append(answer.to_dict())
        whole = chat.encode(messages, mode, drop_thinking=False)
        assert whole.startswith(prompt), "an answer changes nothing before it"
        assert whole.endswith(EOS)
        read, deltas = streamed(whole.removeprefix(prompt), mode, random.Random(seed))
        assert said(read, mode) == said(answer, mode)
        assert read.complete and not read.problems and read.partial_call is None
        check(read, deltas)


@pytest.mark.parametrize("seed", range(4))
def test_spoilt_completions_are_read_the_same_in_any_pieces(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2500):
        text = spoilt(rng)
        mode = rng.choice(chat.MODES)
        whole = chat.parse(text, mode)  # type: ignore[arg-type]
        read, deltas = streamed(text, mode, rng)  # type: ignore[arg-type]
        assert read == whole, text
        check(read, deltas)


@pytest.mark.parametrize("text", VALID)
def test_a_completion_cut_anywhere_is_the_beginning_of_the_whole(text: str) -> None:
    mode: chat.Mode = "thinking" if "</think>" in text else "chat"
    whole = chat.parse(text, mode)
    for end in range(len(text)):
        part = chat.parse(text[:end], mode)
        assert whole.reasoning.startswith(part.reasoning)
        assert part.tool_calls == whole.tool_calls[: len(part.tool_calls)]
        if part.partial_call:
            assert whole.tool_calls[len(part.tool_calls)].arguments.startswith(part.partial_call.arguments)


@settings(deadline=None)
@given(text=st.text() | st.text("<>/｜DSML think\n\"'=a"), mode=MODES, seed=st.integers())
def test_any_text_is_read(text: str, mode: chat.Mode, seed: int) -> None:
    read, deltas = streamed(text, mode, random.Random(seed))
    assert read == chat.parse(text, mode)
    check(read, deltas)
