"""Messages to the text of a prompt.

Source: DeepSeek-V4 encoding/encoding_dsv4.py, encode_messages and render_message.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from v4graph.errors import ChatError
from v4graph_runtime.chat import format as fixed
from v4graph_runtime.chat.checks import check_mode
from v4graph_runtime.chat.conversation import (
    SPEAKERS,
    Merged,
    last_speaker,
    merge,
    read_turns,
    without_developers,
)
from v4graph_runtime.chat.format import CLOSE, END_THINK, OPEN, THINK, Mode
from v4graph_runtime.chat.message import Message, ToolCall
from v4graph_runtime.chat.turns import Turn
from v4graph_runtime.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any] | Message] | Mapping[str, Any]


def encode(
    messages: Messages,
    mode: Mode = "chat",
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    response_format: Mapping[str, Any] | None = None,
    drop_thinking: bool = True,
) -> str:
    """Return the prompt of a conversation, from the BOS token on, in DeepSeek-V4's official format.

    `messages` is a list, or an object with 'messages' and maybe 'tools' and 'response_format'. If the last
    message is a user's, the prompt ends where the assistant begins. `mode` is 'chat', 'thinking', or 'max'
    for Think Max. `drop_thinking` leaves out what was reasoned before the last user message, and developer
    messages before it; with tools nothing is left out.

    Raises:
        ChatError: an unknown mode, or messages that cannot be encoded as they are meant.
    """
    thinking = check_mode(mode) != "chat"
    turns = merge(read_turns(messages, tools, response_format))
    drop = thinking and drop_thinking and not any(one.turn.tools for one in turns)
    if drop:
        turns = without_developers(turns)
    prompt = [fixed.BOS, fixed.THINK_MAX if mode == "max" else ""]
    last = last_speaker(turns)
    for i, one in enumerate(turns):
        reasons = thinking and (not drop or i > last) and not (i and turns[i - 1].turn.task)
        follower = turns[i + 1].turn.role if i + 1 < len(turns) else "assistant"
        text = _turn(one, reasons)
        if follower in ("assistant", "latest_reminder"):
            text += _transition(
                one.turn, THINK if thinking and (not drop or i >= last) else END_THINK, thinking
            )
        prompt.append(_checked(one.turn, text))
    return "".join(prompt)


def missing_tokens(prompt: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the control tokens of a prompt that a tokenizer would spell in characters instead."""
    return tuple(token for token in fixed.CONTROL if token in prompt and not tokenizer.knows(token))


def _turn(one: Merged, reasons: bool) -> str:
    """Return the turn itself; `reasons` puts an assistant's reasoning before what it says."""
    turn = one.turn
    match turn.role:
        case "user":
            return fixed.USER + "\n\n".join(
                f"<tool_result>{block.text}</tool_result>" if block.result else block.text
                for block in one.blocks
            )
        case "assistant":
            reasoning = turn.reasoning + END_THINK if reasons else ""
            return reasoning + turn.text + _calls(turn.tool_calls) + ("" if turn.wo_eos else fixed.EOS)
        case "latest_reminder":
            return fixed.REMINDER + turn.text
        case "developer":
            return fixed.USER + turn.text + _instructions(turn)
        case _:
            return turn.text + _instructions(turn)


def _transition(turn: Turn, think: str, thinking: bool) -> str:
    """Return what asks for the assistant's turn."""
    if turn.task == "action":
        return fixed.ASSISTANT + (THINK if thinking else END_THINK) + fixed.TASKS["action"]
    if turn.task:
        return fixed.TASKS[turn.task]
    return fixed.ASSISTANT + think if turn.role in SPEAKERS else ""


def _instructions(turn: Turn) -> str:
    """Return the sections on tools and on the response's format."""
    text = ""
    if turn.tools:
        schemas = (_json(f"{turn.place}.tools[{i}]", tool) for i, tool in enumerate(turn.tools))
        text += "\n\n" + fixed.TOOLS_BEFORE + "\n".join(schemas) + fixed.TOOLS_AFTER
    if turn.response_format:
        schema = _json(f"{turn.place}.response_format", turn.response_format)
        text += "\n\n" + fixed.RESPONSE_FORMAT + schema
    return text


def _calls(calls: Sequence[ToolCall]) -> str:
    if not calls:
        return ""
    return f"\n\n{OPEN}tool_calls>\n" + "\n".join(map(_call, calls)) + f"\n{CLOSE}tool_calls>"


def _call(call: ToolCall) -> str:
    parameters = "\n".join(
        f'{OPEN}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}{CLOSE}parameter>"
        for name, value in _arguments(call.arguments).items()
    )
    return f'{OPEN}invoke name="{call.name}">\n{parameters}\n{CLOSE}invoke>'


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments by name; text that is no JSON object is one argument, 'arguments'."""
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"arguments": text}


def _json(place: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{place} cannot be written as JSON ({error}).") from error


def _checked(turn: Turn, text: str) -> str:
    """Refuse text that has no UTF-8: half a surrogate pair, as JSON's escapes can write it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ChatError(
            f"{turn.place}: U+{ord(text[error.start]):04X} in its text is half of a character; replace it."
        ) from error
    return text
