"""How next tokens are chosen, as a caller says it; `Sampler` does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from v4graph.errors import SessionError


@dataclass(frozen=True)
class SamplingOptions:
    """What changes a model's probabilities before a token is drawn, in the order in which it is applied.

    Attributes:
        logit_bias: Added to the logits of these token ids.
        repetition_penalty: Logits of tokens of the prompt or the output are divided by it if positive, else
            multiplied. 1: none.
        presence_penalty: Taken off the logits of tokens that the output has.
        frequency_penalty: Taken off as often as the output has them.
        temperature: Divides the logits; 0 takes the most likely token, ties to the lowest id.
        top_k: Sample among so many most likely tokens; 0: all.
        top_p: Sample among the fewest most likely tokens whose probabilities reach this sum.
        min_p: Sample among tokens at least so likely as this share of the most likely one.
        seed: Of the random generator, None for a fresh one.

    Raises:
        SessionError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "more than 0"),
            ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 100, "-100 to 100"),
            ("frequency_penalty", self.frequency_penalty, abs(self.frequency_penalty) <= 100, "-100 to 100"),
            ("seed", self.seed or 0, (self.seed or 0) >= 0, "0 or more"),
        )
        for name, value, valid, expected in checks:
            if not (valid and math.isfinite(value)):
                raise SessionError(f"{name} is {value}, expected {expected}.")
        for token, bias in self.logit_bias.items():
            if token < 0 or not math.isfinite(bias):
                raise SessionError(
                    f"logit_bias is {bias} for token {token}, expected finite numbers for token ids from 0."
                )

    @property
    def penalises(self) -> bool:
        """Whether tokens that the text has already lose or gain by it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def check(self, vocab_size: int) -> None:
        """Refuse what a model of this vocabulary cannot do.

        Raises:
            SessionError: logit_bias names a token that does not exist.
        """
        last = max(self.logit_bias, default=-1)
        if last >= vocab_size:
            raise SessionError(
                f"logit_bias names token {last}, expected token ids from 0 to {vocab_size - 1}."
            )
