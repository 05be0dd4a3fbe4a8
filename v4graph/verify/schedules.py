"""Schedules: how a sequence is cut into calls. Any of them must give the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from v4graph.verify.random_inputs import Array

NAMES = ("prefill", "decode", "ragged")
_LENGTHS = (0, 0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 50, 127, 128, 129)


@dataclass(frozen=True)
class Call:
    """New tokens of each slot, then tokens of each that are taken back, to be fed again."""

    counts: tuple[int, ...]
    back: tuple[int, ...] = ()


def schedule(name: str, batch: int, tokens: int, seed: int = 0) -> list[Call]:
    """Return the calls that feed `tokens` to every slot: at once, one by one, or in ragged pieces."""
    if name == "prefill":
        return [Call((tokens,) * batch)]
    if name == "decode":
        return [Call((1,) * batch) for _ in range(tokens)]
    return ragged(batch, tokens, np.random.default_rng(seed), slack=0)


def ragged(batch: int, tokens: int, generator: np.random.Generator, slack: int) -> list[Call]:
    """Return random pieces per slot, idle slots included, with up to `slack` tokens taken back at times."""
    position, furthest = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    calls = []
    while (position < tokens).any():
        counts = np.minimum(generator.choice(_LENGTHS, batch), tokens - position)
        if not counts.any():
            continue
        position += counts
        furthest = np.maximum(furthest, position)
        allowed = np.minimum(position, slack - (furthest - position)).clip(0)
        back = generator.integers(0, allowed + 1) * (generator.random(batch) < 0.3) * (position < tokens)
        position -= back
        calls.append(Call(tuple(map(int, counts)), tuple(map(int, back))))
    return calls


def chunk_of(ids: Array, position: Array, counts: Sequence[int]) -> Array:
    """Return the next tokens int64 [B, S] of each slot, padded with zeros."""
    chunk = np.zeros((len(counts), max(max(counts), 1)), np.int64)
    for slot, count in enumerate(counts):
        chunk[slot, :count] = ids[slot, position[slot] : position[slot] + count]
    return chunk
