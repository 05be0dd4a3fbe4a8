"""A request that has a slot: its tokens, and logits to the next of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from v4graph_runtime.constraint import Matcher
from v4graph_runtime.request import Finish, Piece, RequestOptions
from v4graph_runtime.sampling import Sampler, token_logprob
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.stop_text import StopText
from v4graph_runtime.tokenizer import IncrementalText, Tokenizer


@dataclass(frozen=True)
class Request:
    """A checked request; `deadline` is a time of `time.monotonic`, None for none."""

    prompt: tuple[int, ...]
    options: RequestOptions
    stop_ids: tuple[int, ...]
    generation: Generation
    matcher: Matcher | None
    deadline: float | None

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return late or self.generation.cancelled


class Running:
    """One request in one slot; `ids` are the prompt and what was generated.

    The tokens behind the slot's position are still to run; behind the last one the next is sampled.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        options = request.options
        self.request = request
        self.generation = request.generation
        self.ids = list(request.prompt)
        self._options = options
        self._sampler = Sampler(options.sampling, request.prompt)
        self._text = IncrementalText(tokenizer, request.prompt, options.special_tokens)
        self._stop = StopText(options.stop)
        self._matcher = request.matcher

    @property
    def reads_prompt(self) -> bool:
        """Whether nothing was generated yet."""
        return len(self.ids) == len(self.request.prompt)

    def take(self, logits: npt.NDArray[np.float32]) -> Finish:
        """Sample a token from logits [V] and hand it over; return why the output ends, if it does.

        Raises:
            SessionError: the logits are not numbers.
        """
        matcher = self._matcher
        token = self._sampler(logits, matcher.allowed() if matcher else None)
        if token in self.request.stop_ids:
            self._flush()
            return "stop"
        if matcher:
            matcher.accept(token)
        self.ids.append(token)
        logprob = None
        if self._options.logprobs is not None:
            logprob = token_logprob(logits, token, self._options.logprobs)
        self.generation.put(Piece(token, self._stop.push(self._text.push(token)), logprob))
        return self._finish(len(self.ids) - len(self.request.prompt))

    def _finish(self, new_tokens: int) -> Finish:
        if self._stop.stopped:
            return "stop"
        # What the constraint asks for is there whole: nothing may follow.
        whole = self._matcher is not None and self._matcher.finished
        if whole or new_tokens == self._options.max_new_tokens:
            self._flush()
            return "stop" if whole else "length"
        return ""

    def _flush(self) -> None:
        """Hand over text that was held back because more might have changed it."""
        text = self._stop.push(self._text.flush())
        text += "" if self._stop.stopped else self._stop.flush()
        if text:
            self.generation.put(Piece(None, text))
