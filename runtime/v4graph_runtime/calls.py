"""One call of a session as runs of its backend: pieces of a prompt, and the slots beside a range."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph_runtime.arguments import Ids
from v4graph_runtime.state import Int32


def vocabulary(manifest: Manifest) -> int:
    """Return the number of logits of a token."""
    return next(int(output.shape[-1]) for output in manifest.outputs if output.name == "logits")


def pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last column of each piece of at most `size` tokens."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def widened(ids: Ids, counts: Int32, slots: range, batch: int) -> tuple[Ids, Int32]:
    """Return ids and counts of the whole batch, in which all but `slots` are idle."""
    rows = slice(slots.start, slots.stop)
    all_ids, all_counts = np.zeros((batch, ids.shape[1]), ids.dtype), np.zeros(batch, np.int32)
    all_ids[rows], all_counts[rows] = ids, counts
    return all_ids, all_counts


def with_reset_slots(error: EngineError, slots: Sequence[int]) -> EngineError:
    """Return a backend's error with what it has cost in its sentence."""
    # A backend's own words, if any, are on the lines below our sentence.
    ours, *theirs = str(error).splitlines()
    ours = f"{ours.removesuffix('.')}; slots {slots} were reset."
    return EngineError("\n".join([ours, *theirs]))
