"""Logits to token ids: biases, penalties, temperature, the most likely tokens, one draw.

The order and the definitions are those of Hugging Face transformers' generation: sequence bias, repetition
penalty, temperature, top-k, top-p, min-p, each share taken of what the step before left. Presence and
frequency penalties, which it does not have, are vLLM's: after the repetition penalty, over the output only.
vLLM differs in one place: it applies min-p before top-k and top-p. Where tokens tie for the last place of
top-k both keep all of them; here the lowest ids are kept, so that k is never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError
from v4graph_runtime.penalties import Penalties, Values
from v4graph_runtime.request import TokenLogprob
from v4graph_runtime.sampling_options import SamplingOptions

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Tokens among which a nucleus is looked for first. Most hold fewer, and sorting a vocabulary takes 10 ms.
NUCLEUS = 256


class Sampler:
    """Chooses the next tokens of one text; the same seed and logits give the same tokens."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int] = ()) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._bias_ids = np.fromiter(options.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(options.logit_bias.values(), np.float64)
        self._penalties = Penalties(options, prompt) if options.penalises else None

    def __call__(self, logits: Logits, allowed: Mask | None = None) -> int:
        """Return a token id for one row of logits [V], and count it as output.

        `allowed` says which tokens may be chosen; those beyond its end may not.

        Raises:
            SessionError: a logit is not a number or all are -inf, no token is allowed, or logit_bias names
                a token that does not exist.
        """
        _check_logits(logits)
        values, ids = self._adjusted(logits), None
        if allowed is not None:
            # Few tokens are allowed as a rule: what follows costs only as much as those.
            ids = np.flatnonzero(allowed)
            values = values[ids]
            _check_allowed(values)
        # One number per token, needed or not: the generator stands where the count of tokens says.
        uniform = self._random.random()
        greedy = self._options.temperature == 0
        index = int(values.argmax()) if greedy else self._draw(values, uniform)
        token = index if ids is None else int(ids[index])
        if self._penalties is not None:
            self._penalties.add(token)
        return token

    def _adjusted(self, logits: Logits) -> Logits | Values:
        if not len(self._bias_ids) and self._penalties is None:
            return logits
        self._options.check(len(logits))
        values = logits.astype(np.float64)
        values[self._bias_ids] += self._bias
        if self._penalties is not None:
            self._penalties.apply(values)
        return values

    def _draw(self, values: Logits | Values, uniform: float) -> int:
        # float64, and the best logit first taken off: a low temperature must not overflow.
        with np.errstate(over="ignore"):
            weights = np.exp((values.astype(np.float64) - float(values.max())) / self._options.temperature)
        kept = self._kept(weights)
        return _pick(weights, uniform) if kept is None else int(kept[_pick(weights[kept], uniform)])

    def _kept(self, weights: Values) -> Ids | None:
        """Return the tokens to draw from; None is all. The largest weight is 1."""
        options, kept = self._options, None
        if 0 < options.top_k < len(weights):
            kept = largest(weights, options.top_k)
        if options.top_p < 1:
            kept = _nucleus(weights, options.top_p, kept)
        if options.min_p > 0:
            likely = (weights if kept is None else weights[kept]) >= options.min_p
            kept = np.flatnonzero(likely) if kept is None else kept[likely]
        return kept


def token_logprob(logits: Logits, token: int, top: int) -> TokenLogprob:
    """Return the log probability of a token, and the `top` most likely ones, from logits [V]."""
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best = largest(values, top) if top else ()
    return TokenLogprob(token, float(values[token]), tuple((int(i), float(values[i])) for i in best))


def largest(values: Values, count: int) -> Ids:
    """Return the ids of the `count` largest values, best first, ties to the lowest id."""
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    last = np.partition(values, len(values) - count)[len(values) - count]
    above = np.flatnonzero(values > last)
    ties = np.flatnonzero(values == last)[: count - len(above)]
    ids = np.concatenate([above, ties])
    return ids[np.argsort(-values[ids], kind="stable")]


def _nucleus(weights: Values, share: float, among: Ids | None) -> Ids:
    """Return the fewest most likely tokens that hold this share of the weight, of `among` if given."""
    total = float(weights.sum() if among is None else weights[among].sum())
    size = NUCLEUS
    while True:
        order = largest(weights, size) if among is None else among
        mass = np.cumsum(weights[order])
        if among is not None or mass[-1] >= share * total or size >= len(weights):
            return order[: int(np.searchsorted(mass, share * total)) + 1]
        size *= 8


def _pick(weights: Values, uniform: float) -> int:
    mass = np.cumsum(weights)
    drawn = int(np.searchsorted(mass, uniform * mass[-1], side="right"))
    # The product may round up to the sum, behind which only tokens of no weight follow.
    return min(drawn, int(np.searchsorted(mass, mass[-1])))


def _check_logits(logits: Logits) -> None:
    best = logits.max()
    if not np.isfinite(best):
        raise SessionError(
            f"the largest logit is {best}: the engine's numbers overflowed or its weights are broken."
        )


def _check_allowed(values: Logits | Values) -> None:
    if not len(values):
        raise SessionError("no token is allowed here; whoever made the mask has to end the text before.")
    if np.isneginf(values.max()):
        raise SessionError(f"the logits of all {len(values)} allowed tokens are -inf, expected a finite one.")
