"""Which rows of a state tensor belong to a slot's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from v4graph.manifest import Manifest
from v4graph_runtime.state import Array


@dataclass(frozen=True)
class StateRows:
    """One state tensor of one layer; `ring` is its number of rows if it is a ring."""

    name: str
    rule: Literal["ring", "append"]
    ratio: int
    ring: int
    width: int
    dtype: str

    def written(self, start: int, position: int, highest: int) -> range:
        """Return the rows that tokens from `start` to `position` have filled, `highest` once reached.

        Of a ring these are all rows written since the last reset, whatever `start` is: any of them may hold
        a row that the next token reads. Others hold what an earlier text left there.
        """
        if self.rule == "ring":
            return range(min(highest, self.ring))
        return range(start // self.ratio, position // self.ratio)

    def fits(self, array: Array, rows: range) -> bool:
        """Return whether an array is these rows of this tensor."""
        return array.shape == (len(rows), self.width) and array.dtype == np.dtype(self.dtype)


def state_rows(manifest: Manifest) -> Iterator[StateRows]:
    """Yield every state tensor of a model."""
    for state in manifest.states:
        _, rows, width = state.shape
        ring = int(rows) if state.rule == "ring" else 0
        for layer in state.layers:
            name = state.name.replace("{i}", str(layer))
            yield StateRows(name, state.rule, state.ratio, ring, int(width), state.dtype)
