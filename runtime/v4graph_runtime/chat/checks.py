"""Refusals that say where, what was got, what is expected, and which known name is near."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

from v4graph.errors import ChatError, near_match
from v4graph_runtime.chat.format import MODES

# Keys of other programs that look like a slip of one of ours.
FOREIGN = ("name", "mask", "id", "tool_name", "reasoning_details", "function_call", "annotations")


def check_mode(mode: str) -> str:
    """Return a known mode.

    Raises:
        ChatError: an unknown one.
    """
    if mode not in MODES:
        raise ChatError(unknown("mode", mode, MODES))
    return mode


def check_keys(place: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a key that looks like a slip of a known one; any other may be another program's."""
    for key in given:
        if key in known or key in FOREIGN or given[key] is None:
            continue
        if near := near_match(str(key), known):
            raise ChatError(f"{place}: unknown key {short(key)}{near} Rename or remove it.")


def expect(place: str, value: Any, kinds: type | UnionType, expected: str) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kinds):
        raise ChatError(f"{place} is {kind_of(value)}, expected {expected}.")


def unknown(what: str, got: Any, known: Iterable[str]) -> str:
    """Return the sentence for a name that is not one of `known`."""
    known = tuple(known)
    near = near_match(got, known) if isinstance(got, str) else ""
    return f"unknown {what} {short(got)}{f'{near} U' if near else '; u'}se one of {', '.join(known)}."


def short(value: Any) -> str:
    """Return a value as an error shows it: on one line, and not endless."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def kind_of(value: Any) -> str:
    """Return what a value is in JSON's words, and short ones as they are."""
    if value is None:
        return "missing"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return short(value) if isinstance(value, str | int | float) else f"of type {type(value).__name__}"
