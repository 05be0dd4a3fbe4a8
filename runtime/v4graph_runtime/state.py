"""State of a batch of slots: positions on the host, and the tensors that the graph updates.

Every state tensor is addressed by absolute position (design.md, section 4), so rolling back and
resetting only change positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (numpy knows "bfloat16" by name once it is imported)
import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError
from v4graph.manifest import Manifest

Array = npt.NDArray[np.generic]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

ALIGNMENT = 64


@dataclass(frozen=True)
class StateTensor:
    """One state tensor of one layer: graph input `name`, graph output `output`."""

    name: str
    output: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one buffer."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def allocate(self) -> Array:
        """Return zeros; pages are not touched before the graph writes them."""
        raw = np.zeros(self.nbytes + ALIGNMENT, np.uint8)
        offset = -raw.ctypes.data % ALIGNMENT
        return raw[offset : offset + self.nbytes].view(self.dtype).reshape(self.shape)


def state_tensors(manifest: Manifest, batch: int) -> Iterator[StateTensor]:
    """Yield every state tensor of the model, at the manifest's capacity."""
    for state in manifest.states:
        shape = (batch, state.rows(manifest.max_seq_len), *(int(size) for size in state.shape[2:]))
        for layer in state.layers:
            index = str(layer)
            yield StateTensor(
                state.name.replace("{i}", index), state.output.replace("{i}", index), shape, state.dtype
            )


class Positions:
    """Tokens held by each slot, their ids, and the highest position that each slot ever wrote.

    A ring keeps `slack` rows more than the model reads, so a slot can go back to `slack` tokens
    below its highest position since its last reset; what lay before is overwritten.
    """

    def __init__(self, batch: int, capacity: int, slack: int) -> None:
        self.capacity = capacity
        self.slack = slack
        self.tokens: Int32 = np.zeros(batch, np.int32)
        self.highest: Int32 = np.zeros(batch, np.int32)
        # Pages are not touched before ids are written.
        self._ids: Int32 = np.zeros((batch, capacity), np.int32)

    def check_room(self, num_tokens: Int64, slots: range) -> None:
        """Refuse tokens that do not fit.

        Raises:
            SessionError: names the first slot without room.
        """
        held = self.tokens[slots.start : slots.stop]
        needed = held + num_tokens
        for index in np.flatnonzero(needed > self.capacity)[:1]:
            raise SessionError(
                f"slot {slots[index]}: {num_tokens[index]} tokens after {held[index]} need {needed[index]} "
                f"positions but the engine holds {self.capacity}; export again with "
                f"`v4graph export --max-seq-len {needed[index]}` or reset the slot."
            )

    def advance(self, ids: Int64, num_tokens: Int32, slots: range) -> None:
        """Count and keep tokens that the graph has written: ids [slots, S], `num_tokens` of each row."""
        for index in np.flatnonzero(num_tokens):
            slot, count = slots[index], num_tokens[index]
            start = self.tokens[slot]
            self._ids[slot, start : start + count] = ids[index, :count]
            self.tokens[slot] = start + count
        np.maximum(self.highest, self.tokens, out=self.highest)

    def held(self, slot: int) -> Int32:
        """Return the ids in a slot's state (a copy)."""
        return self._ids[slot, : self.tokens[slot]].copy()

    def put(self, slot: int, ids: Int32, highest: int) -> None:
        """Say that a slot holds these tokens; `highest` is the highest position that its rings saw."""
        self._ids[slot, : len(ids)] = ids
        self.tokens[slot], self.highest[slot] = len(ids), highest

    def limits(self) -> Int32:
        """Return how many tokens of each slot could be taken back."""
        oldest = np.maximum(self.highest - self.slack, 0)
        return np.maximum(self.tokens - oldest, 0)

    def rollback(self, tokens: Int64) -> None:
        """Take the last `tokens` [B] of each slot back.

        Raises:
            SessionError: a slot holds fewer tokens, or its rings no longer hold what came before.
        """
        possible = self.limits()
        for slot in np.flatnonzero(tokens > possible)[:1]:
            raise SessionError(
                f"slot {slot}: cannot roll back {tokens[slot]} tokens from position {self.tokens[slot]}, "
                f"{possible[slot]} are possible (its highest position was {self.highest[slot]} and the "
                f"engine keeps {self.slack} more); export with a larger `--rollback-slack` or reset the slot."
            )
        self.tokens -= tokens.astype(np.int32)

    def reset(self, slots: Int64) -> None:
        """Empty the slots: masks are positional, so their tensors need no clearing."""
        self.tokens[slots] = 0
        self.highest[slots] = 0
