"""Teacher-forced agreement of two sets of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from v4graph.verify.random_inputs import Array

# Where fp32's two best logits are closer, bf16 and FP8 roundings decide between them.
DECIDED = 0.05


@dataclass(frozen=True)
class Limits:
    """What counts as agreement: the largest difference, or if quantised KL and argmax on decided tokens."""

    exact: bool
    atol: float = 1e-4
    kl: float = 5e-3
    argmax: float = 0.95


@dataclass(frozen=True)
class Agreement:
    """Of the compared positions: differences of logits, mean KL(a || b) in nats, shares of equal argmax."""

    positions: int
    max_difference: float
    mean_difference: float
    mean_kl: float
    argmax: float
    argmax_decided: float
    per_position: tuple[dict[str, float | int], ...]

    def holds(self, limits: Limits) -> bool:
        """Whether it is within the limits."""
        if not np.isfinite(self.max_difference):
            return False
        if limits.exact:
            return self.max_difference <= limits.atol
        return self.mean_kl <= limits.kl and self.argmax_decided >= limits.argmax


def compare(a: Array, b: Array) -> Agreement:
    """Compare logits [B, S, V]; positions that either side has not (NaN in all of V) are left out."""
    there = ~(np.isnan(a).all(-1) | np.isnan(b).all(-1))
    rows_a, rows_b = a[there].astype(np.float64), b[there].astype(np.float64)
    difference = np.abs(rows_a - rows_b)
    log_a, log_b = _log_softmax(rows_a), _log_softmax(rows_b)
    kl = (np.exp(log_a) * (log_a - log_b)).sum(-1)
    same = rows_a.argmax(-1) == rows_b.argmax(-1)
    best = np.sort(rows_a, -1)[:, -2:]
    decided = best[:, 1] - best[:, 0] > DECIDED
    slots, tokens = np.nonzero(there)
    per_position = tuple(
        {
            "slot": int(slots[i]),
            "token": int(tokens[i]),
            "max_difference": float(difference[i].max()),
            "kl": float(kl[i]),
            "same_argmax": int(same[i]),
        }
        for i in range(len(slots))
    )
    return Agreement(
        positions=len(slots),
        max_difference=_nan_is_infinite(difference.max(initial=0.0)),
        mean_difference=_nan_is_infinite(difference.mean()) if difference.size else 0.0,
        mean_kl=_nan_is_infinite(kl.mean()) if kl.size else 0.0,
        argmax=float(same.mean()) if same.size else 1.0,
        argmax_decided=float(same[decided].mean()) if decided.any() else 1.0,
        per_position=per_position,
    )


def _nan_is_infinite(value: np.floating) -> float:
    return float("inf") if np.isnan(value) else float(value)


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(-1, keepdims=True)
    total: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return total
