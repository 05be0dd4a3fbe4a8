"""Checked access to single values of a parsed config.json; every error names the file and the key."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from v4graph.errors import ConfigError, near_match

Raw = dict[str, Any]
_Number = TypeVar("_Number", int, float)


def number(raw: Raw, key: str, source: str, kind: type[_Number], least: float) -> _Number:
    """Return `raw[key]` as `kind`, at least `least`; 10000.0 counts as an integer, true does not."""
    value = raw.get(key)
    if value is None:
        raise ConfigError(f"{source}: key '{key}' is missing; copy the model's config.json again.")
    fits = isinstance(value, int) or (isinstance(value, float) and (kind is float or value.is_integer()))
    if isinstance(value, bool) or not fits or not least <= value < math.inf:
        wanted = "an integer" if kind is int else "a number"
        raise ConfigError(f"{source}: {key} is {value!r}, expected {wanted} of at least {least}.")
    return kind(value)


def token(raw: Raw, key: str, source: str) -> int:
    """Return a token id: the first of a list, -1 when there is none."""
    value = raw.get(key)
    if isinstance(value, list):
        value = value[0] if value else None
    return -1 if value is None else number({key: value}, key, source, int, 0)


def items(raw: Raw, key: str, source: str) -> list[Any]:
    """Return `raw[key]`, which must be a list."""
    value = raw[key]
    if not isinstance(value, list):
        raise ConfigError(f"{source}: {key} is {value!r}, expected a list.")
    return value


def table(raw: Raw, key: str, source: str, known: frozenset[str]) -> Raw:
    """Return `raw[key]`, which must be an object with no other keys than `known`."""
    value = raw[key]
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {key} is {value!r}, expected an object.")
    for name in value:
        if name not in known:
            raise ConfigError(f"{source}: unknown key '{name}' in {key}{near_match(name, known) or '.'}")
    return value
