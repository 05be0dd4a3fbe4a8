"""A list of messages, or an object with one and tools, to checked turns in the order of the prompt.

Source: DeepSeek-V4 encoding/encoding_dsv4.py, merge_tool_messages, sort_tool_results_by_call_order and
_drop_thinking_messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from v4graph.errors import ChatError, near_match
from v4graph_runtime.chat.checks import check_keys, kind_of, short
from v4graph_runtime.chat.turns import Turn, read_turn

SPEAKERS = ("user", "developer")


@dataclass(frozen=True)
class Block:
    """One of the parts that a user turn is merged of: text, or a tool's result."""

    text: str
    result: bool
    call_id: str


@dataclass(frozen=True)
class Merged:
    """A turn of the prompt; a user turn has blocks instead of a text."""

    turn: Turn
    blocks: tuple[Block, ...] = ()


def read_turns(given: Any, tools: Any, response_format: Any) -> list[Turn]:
    """Return the checked messages; tools and response format go on the first system message, or a new one.

    Raises:
        ChatError: no list of messages, a message that cannot be encoded, tools given twice, or a tool's
            result without a call.
    """
    extras = {"tools": tools, "response_format": response_format}
    if isinstance(given, Mapping):
        check_keys("the conversation", given, ("messages", *extras))
        for key, value in extras.items():
            if given.get(key) and value:
                raise ChatError(f"{key}: given twice, in the conversation and beside it; leave one out.")
        extras = {key: value or given.get(key) for key, value in extras.items()}
        given = given.get("messages")
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise ChatError(
            f"messages is {kind_of(given)}, expected a list of messages, or an object with 'messages'."
        )
    if not given:
        raise ChatError('messages is empty; give at least one, as {"role": "user", "content": "Hello"}.')
    places = [(f"messages[{i}]", message) for i, message in enumerate(given)]
    extras = {key: value for key, value in extras.items() if value}
    turns = [read_turn(*one) for one in (_with_extras(places, extras) if extras else places)]
    _check_results(turns)
    return turns


def _with_extras(messages: list[tuple[str, Any]], extras: dict[str, Any]) -> list[tuple[str, Any]]:
    place, first = messages[0]
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return [("the conversation", {"role": "system", **extras}), *messages]
    for key in extras:
        if first.get(key):
            raise ChatError(f"{key}: given twice, in {place} and for the conversation; leave one out.")
    return [(place, {**first, **extras}), *messages[1:]]


def _check_results(turns: Iterable[Turn]) -> None:
    """Refuse a result of no call; calls without ids take results without or with any."""
    ids: list[str] | None = None
    for turn in turns:
        if turn.tool_calls:
            ids = [call.id for call in turn.tool_calls if call.id]
        if turn.role != "tool":
            continue
        if ids is None:
            raise ChatError(
                f"{turn.place}: a tool's result without a call; put the assistant message with its "
                "'tool_calls' before it."
            )
        if turn.call_id and ids and turn.call_id not in ids:
            near = near_match(turn.call_id, ids)
            raise ChatError(
                f"{turn.place}: tool_call_id {short(turn.call_id)} is no call of the last assistant message"
                f"{f'{near} U' if near else '; u'}se one of {', '.join(ids)}."
            )


def merge(turns: Iterable[Turn]) -> list[Merged]:
    """Join tool results and the user messages next to them to one user turn, results in the calls' order.

    Raises:
        ChatError: a message with a task that would be joined to the one before it, and its task lost.
    """
    merged: list[Merged] = []
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role not in ("user", "tool"):
            merged.append(Merged(turn))
            if turn.tool_calls:
                order = {call.id: i for i, call in enumerate(turn.tool_calls) if call.id}
            continue
        block = Block(turn.text, turn.role == "tool", turn.call_id)
        last = merged[-1] if merged and merged[-1].turn.role == "user" else None
        if last is None or (turn.role == "user" and last.turn.task):
            merged.append(Merged(replace(turn, role="user"), (block,)))
            continue
        if turn.task:
            raise ChatError(
                f"{turn.place}: a task on a message that is joined to the one before it; put both texts and "
                "the task into one message."
            )
        merged[-1] = replace(last, blocks=_sorted((*last.blocks, block), order))
    return merged


def _sorted(blocks: tuple[Block, ...], order: Mapping[str, int]) -> tuple[Block, ...]:
    """Sort the results among themselves; texts stay where they are."""
    results = iter(sorted((b for b in blocks if b.result), key=lambda block: order.get(block.call_id, 0)))
    return tuple(next(results) if block.result else block for block in blocks)


def without_developers(turns: list[Merged]) -> list[Merged]:
    """Leave out developer messages before the last message of a user or developer."""
    last = last_speaker(turns)
    return [one for i, one in enumerate(turns) if i >= last or one.turn.role != "developer"]


def last_speaker(turns: list[Merged]) -> int:
    """Return the index of the last user or developer turn, -1 if there is none."""
    return max((i for i, one in enumerate(turns) if one.turn.role in SPEAKERS), default=-1)
