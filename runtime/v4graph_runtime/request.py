"""What a caller asks of an engine loop, and what comes back token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from v4graph.errors import SessionError
from v4graph_runtime.sampling_options import SamplingOptions

Finish = Literal["", "stop", "length", "cancelled", "error"]
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Constraint:
    """What the output must match: `text` is a JSON schema, a regular expression, or empty for any object.

    `after` is a text of one token, as `</think>`, behind which the constraint begins; at once if empty.
    """

    kind: Literal["json_schema", "json_object", "regex"]
    text: str = ""
    after: str = ""


@dataclass(frozen=True)
class RequestOptions:
    """How to go on from one prompt.

    Attributes:
        max_new_tokens: Finish with "length" after so many.
        sampling: See `SamplingOptions`.
        stop: Texts that end the output and are not part of it.
        stop_ids: Tokens that do so; None means config.json's eos_token_id.
        logprobs: None for none, else the number of most likely tokens to name beside each chosen one.
        constraint: What the output must match.
        special_tokens: Control tokens are part of the text, as `chat.Parser` needs them.
        timeout: Seconds after which the request is cancelled; None for no limit.

    Raises:
        SessionError: a value out of range.
    """

    max_new_tokens: int = 128
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None
    special_tokens: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SessionError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1.")
        if "" in self.stop:
            raise SessionError("stop holds an empty text, which would end every output; leave it out.")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise SessionError(f"logprobs is {self.logprobs}, expected 0 to {MOST_LOGPROBS}.")
        if self.timeout is not None and not self.timeout > 0:
            raise SessionError(f"timeout is {self.timeout}, expected more than 0 seconds.")


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before penalties, temperature and constraint.

    `top` are the most likely tokens, best first, ties to the lowest id.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """A generated token and the text that became certain by it, which may be empty.

    `token` is None in a last piece that only brings text that was held back.
    """

    token: int | None
    text: str
    logprob: TokenLogprob | None = None
