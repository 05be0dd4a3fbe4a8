"""One message, an object as in OpenAI's API, to a checked turn.

What cannot be encoded as it is meant is refused; only keys that mean nothing to the model are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4graph.errors import ChatError
from v4graph_runtime.chat.checks import check_keys, expect, kind_of, short, unknown
from v4graph_runtime.chat.format import TASKS
from v4graph_runtime.chat.message import Message, ToolCall

# Role -> the keys that mean something there, besides role and content.
KEYS: dict[str, tuple[str, ...]] = {
    "system": ("tools", "response_format", "task"),
    "user": ("task",),
    "assistant": ("reasoning_content", "reasoning", "tool_calls", "wo_eos", "prefix", "task"),
    "tool": ("tool_call_id",),
    "developer": ("tools", "response_format", "task"),
    "latest_reminder": ("task",),
}
ALL_KEYS = tuple(dict.fromkeys(("role", "content", *(key for keys in KEYS.values() for key in keys))))


@dataclass(frozen=True)
class Turn:
    """A checked message.

    Attributes:
        place: Where it stands in what was given, for errors.
        text: The content; of list contents the texts, joined.
        call_id: The call whose result a tool turn is, if it says so.
        wo_eos: The turn is the beginning of a completion that goes on.
    """

    place: str
    role: str
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Mapping[str, Any] | None = None
    task: str = ""
    call_id: str = ""
    wo_eos: bool = False


def read_turn(place: str, message: Any) -> Turn:
    """Return the turn that a message is.

    Raises:
        ChatError: an unknown role or key, a wrong type, a missing content, a key of another role.
    """
    if isinstance(message, Message):
        message = message.to_dict()
    expect(place, message, Mapping, "an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in KEYS:
        raise ChatError(f"{place}: {unknown('role', role, tuple(KEYS))}")
    _check_keys(place, role, message)
    task = _text(place, message, "task")
    if task and task not in TASKS:
        raise ChatError(f"{place}: {unknown('task', task, tuple(TASKS))}")
    turn = Turn(
        place=place,
        role=role,
        text=_content(f"{place}.content", message.get("content"), role),
        reasoning=_text(place, message, "reasoning_content") or _text(place, message, "reasoning"),
        tool_calls=_tool_calls(f"{place}.tool_calls", message.get("tool_calls") or ()),
        tools=_tools(f"{place}.tools", message.get("tools") or ()),
        response_format=message.get("response_format") or None,
        task=task,
        call_id=_text(place, message, "tool_call_id"),
        wo_eos=any(_flag(place, message, key) for key in ("wo_eos", "prefix")),
    )
    if turn.response_format is not None:
        expect(f"{place}.response_format", turn.response_format, Mapping, "a JSON schema")
    _check_content(turn, message)
    return turn


def _check_keys(place: str, role: str, message: Mapping[str, Any]) -> None:
    check_keys(place, message, ALL_KEYS)
    allowed = ("role", "content", *KEYS[role])
    for key in ALL_KEYS:
        if key not in allowed and message.get(key):
            roles = " or ".join(name for name, keys in KEYS.items() if key in keys)
            raise ChatError(
                f"{place}: '{key}' on a message of role {role}; it belongs on one of role {roles}."
            )


def _check_content(turn: Turn, message: Mapping[str, Any]) -> None:
    """Refuse a message that says nothing where the format needs something."""
    if turn.role == "developer" and not turn.text:
        raise ChatError(f"{turn.place}: a developer message without content; give it some text.")
    if message.get("content") is not None:
        return
    instead = {
        "system": ("tools", "response_format"),
        "assistant": ("tool_calls", "reasoning_content", "reasoning"),
    }.get(turn.role, ())
    if not any(message.get(key) for key in instead):
        alternatives = "".join(f" or '{key}'" for key in instead[:2])
        raise ChatError(
            f"{turn.place}: no 'content'{alternatives}, which role {turn.role} needs; give '' for none."
        )


def _content(place: str, content: Any, role: str) -> str:
    """Return text, of a list the texts of its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    expect(place, content, list | tuple, "a string, or a list of {'type': 'text', 'text': ...}")
    return "\n\n".join(_part(f"{place}[{i}]", part, role) for i, part in enumerate(content))


def _part(place: str, part: Any, role: str) -> str:
    expect(place, part, Mapping, "an object {'type': 'text', 'text': ...}")
    if part.get("type") == "text":
        return _text(place, part, "text", required=True)
    if role == "tool":
        # As the official encoder does: what a tool returns beside text is not the user's mistake.
        return f"[Unsupported {part.get('type')}]"
    raise ChatError(
        f"{place}: a part of type {short(part.get('type'))}; the model reads parts of type 'text'."
    )


def _tools(place: str, tools: Any) -> tuple[Mapping[str, Any], ...]:
    expect(place, tools, list | tuple, "a list of {'type': 'function', 'function': {...}}")
    return tuple(_function(f"{place}[{i}]", tool) for i, tool in enumerate(tools))


def _function(place: str, item: Any) -> Mapping[str, Any]:
    expect(place, item, Mapping, "an object {'type': 'function', 'function': {...}}")
    function: Mapping[str, Any] = item.get("function")
    expect(f"{place}.function", function, Mapping, "an object with a 'name'")
    if not _text(f"{place}.function", function, "name", required=True):
        raise ChatError(f"{place}.function.name is empty; give the function a name.")
    return function


def _tool_calls(place: str, calls: Any) -> tuple[ToolCall, ...]:
    expect(place, calls, list | tuple, "a list of {'id': ..., 'type': 'function', 'function': {...}}")
    return tuple(_tool_call(f"{place}[{i}]", call) for i, call in enumerate(calls))


def _tool_call(place: str, call: Any) -> ToolCall:
    function = _function(place, call)
    arguments: Any = function.get("arguments")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatError(f"{place}.function.arguments cannot be written as JSON ({error}).") from error
    expect(f"{place}.function.arguments", arguments, str, "a JSON object, as text or as it is")
    return ToolCall(function["name"], arguments, _text(place, call, "id") or _text(place, function, "id"))


def _text(place: str, message: Mapping[str, Any], key: str, *, required: bool = False) -> str:
    value = message.get(key)
    if value is None and not required:
        return ""
    expect(f"{place}.{key}", value, str, "a string")
    return str(value)


def _flag(place: str, message: Mapping[str, Any], key: str) -> bool:
    value = message.get(key)
    if value not in (None, True, False):
        raise ChatError(f"{place}.{key} is {kind_of(value)}, expected true or false.")
    return bool(value)
