"""Logits to an output: its tokens, the text that each makes certain, and why it ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from v4graph_runtime.constraint import Matcher
from v4graph_runtime.request import Finish, Piece, RequestOptions
from v4graph_runtime.sampling import Sampler, token_logprob
from v4graph_runtime.stop_text import StopText
from v4graph_runtime.tokenizer import IncrementalText, Tokenizer


class Output:
    """One output behind a prompt; whoever feeds it runs the graph.

    `finish` is empty while more may follow, `new_tokens` counts the tokens but the one that ends it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: RequestOptions,
        stop_ids: Sequence[int],
        matcher: Matcher | None,
    ) -> None:
        self.finish: Finish = ""
        self.new_tokens = 0
        self._options, self._stop_ids, self._matcher = options, frozenset(stop_ids), matcher
        self._sample = Sampler(options.sampling, prompt)
        self._text = IncrementalText(tokenizer, prompt, options.special_tokens)
        self._stop = StopText(options.stop)

    def take(self, logits: npt.NDArray[np.float32]) -> list[Piece]:
        """Choose the token behind logits [V]; return it with its text, and at the end what was held back.

        Raises:
            SessionError: the logits are not numbers.
        """
        matcher = self._matcher
        token = self._sample(logits, matcher.allowed() if matcher else None)
        if token in self._stop_ids:
            self.finish = "stop"
            return self._held_back()
        if matcher:
            matcher.accept(token)
        self.new_tokens += 1
        top = self._options.logprobs
        logprob = None if top is None else token_logprob(logits, token, top)
        piece = Piece(token, self._stop.push(self._text.push(token)), logprob)
        return [piece, *self._end_if_over()]

    def _end_if_over(self) -> list[Piece]:
        if self._stop.stopped:
            self.finish = "stop"
            return []
        # What the constraint asks for is there whole: nothing may follow.
        whole = self._matcher is not None and self._matcher.finished
        if not whole and self.new_tokens < self._options.max_new_tokens:
            return []
        rest = self._held_back()
        self.finish = "stop" if whole or self._stop.stopped else "length"
        return rest

    def _held_back(self) -> list[Piece]:
        """Return the text that waited because more might have changed it."""
        text = self._stop.push(self._text.flush())
        text += "" if self._stop.stopped else self._stop.flush()
        return [Piece(None, text)] if text else []
