"""What an engine loop has done and holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class EngineStats:
    """A moment's figures; counters grow from the engine's start.

    Attributes:
        slots: Requests that can run at once; `running` do, `waiting` wait for a slot.
        capacity: Tokens that a slot can hold; `held_tokens` are in the states of those running.
        state_bytes: Bytes of the states of all slots.
        finished: Requests that ended, by `Finish`; `refused` were not taken.
        prompt_tokens: Of the requests that got a slot; `cached_tokens` of them came from kept states.
        steps, busy_seconds: Rounds of the loop that ran the graph, and the time they took.
        cache: Figures of the prefix cache, empty without one.
    """

    slots: int
    capacity: int
    state_bytes: int
    running: int
    waiting: int
    held_tokens: int
    uptime: float
    finished: dict[str, int]
    refused: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    busy_seconds: float
    cache: dict[str, Any]


@dataclass
class Counters:
    """What grows; only the loop's thread writes it, but for `refused`."""

    finished: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
