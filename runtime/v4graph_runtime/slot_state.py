"""What one slot holds: its tokens, and the rows of the state tensors that belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from v4graph_runtime.state import Array, Int32, Positions
from v4graph_runtime.state_rows import StateRows

Rows = Mapping[str, Array]


class Holder(Protocol):
    """What holds state tensors [B, rows, width]; a backend is one."""

    def read_state(self, name: str, slot: int, rows: range) -> Array:
        """Return a copy of some rows of a slot, [len(rows), width]."""

    def write_state(self, name: str, slot: int, rows: range, array: Array) -> None:
        """Replace some rows of a slot by `array` [len(rows), width]."""


@dataclass(frozen=True)
class SlotState:
    """Tokens and rows of one slot.

    `appended` are the rows of append-only caches that the tokens from `since` on have filled, by state
    name; `rings` are the rows of rings that were ever written, up to position `highest`.
    """

    tokens: Int32
    highest: int
    rings: Rows
    appended: Rows
    since: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and tokens."""
        arrays = (self.tokens, *self.rings.values(), *self.appended.values())
        return sum(array.nbytes for array in arrays)

    @classmethod
    def take(
        cls, holder: Holder, layout: Iterable[StateRows], positions: Positions, slot: int, since: int = 0
    ) -> SlotState:
        """Copy a slot out of a backend."""
        tokens, highest = positions.held(slot), int(positions.highest[slot])
        rings, appended = dict[str, Array](), dict[str, Array]()
        for state in layout:
            rows = state.written(since, len(tokens), highest)
            group = rings if state.rule == "ring" else appended
            group[state.name] = holder.read_state(state.name, slot, rows)
        return cls(tokens, highest, rings, appended, since)

    def put(self, holder: Holder, layout: Iterable[StateRows], positions: Positions, slot: int) -> None:
        """Make a slot of a backend hold this; if that fails half-way the slot is empty."""
        positions.reset(np.array([slot]))
        for state, rows, array in self.parts(layout):
            assert array is not None
            holder.write_state(state.name, slot, rows, array)
        positions.put(slot, self.tokens, self.highest)

    def parts(self, layout: Iterable[StateRows]) -> Iterator[tuple[StateRows, range, Array | None]]:
        """Yield each state tensor with the rows that it should have here and what there is."""
        for state in layout:
            group = self.rings if state.rule == "ring" else self.appended
            rows = state.written(self.since, len(self.tokens), self.highest)
            yield state, rows, group.get(state.name)


def joined(pieces: Sequence[Rows]) -> Rows:
    """Return the cache rows of a text from those of its pieces; names that one of them lacks are left out."""
    names = [name for name in pieces[0] if all(name in piece for piece in pieces)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in names}
