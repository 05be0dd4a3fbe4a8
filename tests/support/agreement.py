"""Teacher-forced agreement of two sets of logits: KL divergence and argmax."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """Mean KL(want || got) in nats, and the share of positions with the same argmax."""

    mean_kl: float
    argmax: float

    def __str__(self) -> str:
        return f"mean KL {self.mean_kl:.2e}, argmax agreement {self.argmax:.2%}"


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def agreement(got: Logits, want: Logits) -> Agreement:
    """Compare logits [..., V]."""
    p, q = _log_softmax(want), _log_softmax(got)
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    return Agreement(float(kl), float((got.argmax(-1) == want.argmax(-1)).mean()))
