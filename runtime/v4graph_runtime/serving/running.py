"""A request that has a slot: its tokens, and logits to the next of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from v4graph_runtime.constraint import Matcher
from v4graph_runtime.output import Output
from v4graph_runtime.request import Finish, RequestOptions
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.tokenizer import Tokenizer


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
        self.request = request
        self.generation = request.generation
        self.ids = list(request.prompt)
        self._output = Output(tokenizer, request.prompt, request.options, request.stop_ids, request.matcher)

    @property
    def reads_prompt(self) -> bool:
        """Whether nothing was generated yet."""
        return len(self.ids) == len(self.request.prompt)

    def take(self, logits: npt.NDArray[np.float32]) -> Finish:
        """Sample a token from logits [V] and hand it over; return why the output ends, if it does.

        Raises:
            SessionError: the logits are not numbers.
        """
        for piece in self._output.take(logits):
            if piece.token is not None:
                self.ids.append(piece.token)
            self.generation.put(piece)
        return self._output.finish
