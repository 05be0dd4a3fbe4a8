"""Penalties on tokens that a text has already, over its distinct tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from v4graph_runtime.sampling_options import SamplingOptions

Values = npt.NDArray[np.float64]

LARGEST = np.finfo(np.float64).max


class Penalties:
    """The distinct tokens of prompt and output and how often the output has each, in arrays that grow."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int] = ()) -> None:
        self._options = options
        # Presence and frequency look at the output only, so a prompt costs nothing without repetition.
        seen = np.unique(np.asarray(prompt if options.repetition_penalty != 1 else (), np.int64))
        self._place = {token: place for place, token in enumerate(seen.tolist())}
        self._ids = seen
        self._counts = np.zeros(len(seen))

    def add(self, token: int) -> None:
        """Count a token of the output."""
        place = self._place.setdefault(token, len(self._place))
        if place == len(self._ids):
            self._grow()
        self._ids[place] = token
        self._counts[place] += 1

    def apply(self, logits: Values) -> None:
        """Penalise logits [V] in place; what has no chance (-inf) keeps none."""
        used = len(self._place)
        ids, counts, options = self._ids[:used], self._counts[:used], self._options
        before = logits[ids]
        factor = options.repetition_penalty
        # A penalty near 0 may overflow, and the difference of two infinities would be no number.
        with np.errstate(over="ignore"):
            after = np.where(before > 0, before / factor, before * factor)
            after -= options.presence_penalty * (counts > 0) + options.frequency_penalty * counts
        logits[ids] = np.where(np.isneginf(before), before, np.clip(after, -LARGEST, LARGEST))

    def _grow(self) -> None:
        more = max(64, len(self._ids))
        self._ids = np.concatenate([self._ids, np.zeros(more, np.int64)])
        self._counts = np.concatenate([self._counts, np.zeros(more)])
