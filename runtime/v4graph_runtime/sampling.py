"""Logits to token ids: greedy, temperature, nucleus (top-p)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError


@dataclass
class Sampler:
    """Chooses next tokens; the same seed and logits give the same tokens.

    Attributes:
        temperature: 0 takes the most likely token, ties to the lowest id.
        top_p: Sample among the fewest most likely tokens whose probabilities reach this sum.
        seed: Seed of the random generator, None for a fresh one.

    Raises:
        SessionError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise SessionError(f"temperature is {self.temperature}, expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise SessionError(f"top_p is {self.top_p}, expected more than 0 and at most 1.")
        if self.seed is not None and self.seed < 0:
            raise SessionError(f"seed is {self.seed}, expected 0 or more.")
        self._random = np.random.default_rng(self.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> int:
        """Return a token id for one row of logits [V].

        Raises:
            SessionError: a logit is not a number, or all are -inf.
        """
        best = logits.max()
        if not np.isfinite(best):
            raise SessionError(
                f"the largest logit is {best}: the engine's numbers overflowed or its weights are broken."
            )
        if self.temperature == 0:
            return int(logits.argmax())
        # float64, and the best logit first taken off: a low temperature must not overflow.
        with np.errstate(over="ignore"):
            weights = np.exp((logits.astype(np.float64) - float(best)) / self.temperature)
        if self.top_p == 1:
            return self._draw(weights)
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order])
        kept = int(np.searchsorted(mass, self.top_p * mass[-1])) + 1
        return int(order[self._draw(weights[order[:kept]])])

    def _draw(self, weights: npt.NDArray[np.float64]) -> int:
        mass = np.cumsum(weights)
        drawn = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        return min(drawn, len(mass) - 1)
