"""Prompt text to a stream of generated text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from v4graph.errors import SessionError
from v4graph_runtime.constraint import Grammars, Matcher
from v4graph_runtime.output import Output
from v4graph_runtime.request import Constraint, Finish, RequestOptions
from v4graph_runtime.sampling_options import SamplingOptions
from v4graph_runtime.session import Logits, Session
from v4graph_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerateOptions:
    """How to go on from a prompt.

    Attributes:
        max_new_tokens: Stop after so many.
        stop_ids: Tokens that end the text and are not part of it; None means config.json's
            eos_token_id.
        stop: Texts that do so.
        constraint: What the text must match; it ends when nothing may follow.

    The others are `SamplingOptions`'.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: tuple[int, ...] | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None

    def request(self) -> RequestOptions:
        """Return the same in the form that checks it.

        Raises:
            SessionError: a value out of range.
        """
        names = (one.name for one in fields(SamplingOptions))
        return RequestOptions(
            max_new_tokens=self.max_new_tokens,
            sampling=SamplingOptions(**{name: getattr(self, name) for name in names}),
            stop=self.stop,
            stop_ids=self.stop_ids,
            constraint=self.constraint,
        )


@dataclass
class Stats:
    """What a stream has done so far; times in seconds, on the wall clock."""

    prompt_tokens: int
    state_bytes: int
    new_tokens: int = 0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0
    finish: Finish = ""

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first one by the time they took, 0 before there are any."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens by the time to the first token."""
        return self.prompt_tokens / self.time_to_first_token if self.time_to_first_token else 0.0


class TextStream(Iterator[str]):
    """Iterator over pieces of generated text; `stats` and `ids` grow with it."""

    def __init__(
        self, session: Session, tokenizer: Tokenizer, prompt: list[int], options: GenerateOptions
    ) -> None:
        request = options.request()
        stop_ids = stop_tokens(session) if request.stop_ids is None else request.stop_ids
        self.stats = Stats(prompt_tokens=len(prompt), state_bytes=session.state_bytes)
        self.ids: list[int] = []
        matcher = _matcher(session, tokenizer, stop_ids, request.constraint)
        self._output = Output(tokenizer, prompt, request, stop_ids, matcher)
        self._pieces = self._generate(session, prompt)

    def __next__(self) -> str:
        """Return the next piece, never an empty one."""
        return next(self._pieces)

    def _generate(self, session: Session, prompt: list[int]) -> Iterator[str]:
        began = time.perf_counter()
        logits = session.prefill([prompt])
        while True:
            pieces = self._output.take(_last_row(logits))
            self._count(time.perf_counter() - began)
            self.ids += [piece.token for piece in pieces if piece.token is not None]
            yield from (piece.text for piece in pieces if piece.text)
            if self.stats.finish:
                return
            # The time that the consumer took with the last piece is not counted.
            began = time.perf_counter()
            logits = session.decode(self.ids[-1:])

    def _count(self, seconds: float) -> None:
        """Note a round of the graph; one that only ends the output is no token's time."""
        stats, output = self.stats, self._output
        if not stats.time_to_first_token:
            stats.time_to_first_token = seconds
        elif output.new_tokens > stats.new_tokens:
            stats.decode_seconds += seconds
        stats.new_tokens, stats.finish = output.new_tokens, output.finish


def stream(session: Session, tokenizer: Tokenizer, prompt: str, options: GenerateOptions) -> TextStream:
    """Append a prompt to the session's one slot and stream what follows.

    The last generated token is not in the session's state. Everything that can be refused is refused
    here, before the first token.

    Raises:
        SessionError: a batch other than 1, an empty prompt, an option out of range, a tokenizer of
            another vocabulary, a constraint that cannot be compiled, or no room for the prompt and the
            new tokens.
    """
    if session.batch != 1:
        raise SessionError(f"text is generated by a session of batch 1, this one has {session.batch}.")
    options.request().sampling.check(session.vocab_size)
    check_vocabulary(session, tokenizer)
    position = int(session.position[0])
    ids = tokenizer.encode(prompt, start=position == 0)
    if not ids:
        raise SessionError(
            "the prompt is empty and the tokenizer has no BOS token to start from; give some text."
        )
    check_room(position, len(ids), options.max_new_tokens, session.capacity)
    return TextStream(session, tokenizer, ids, options)


def _matcher(
    session: Session, tokenizer: Tokenizer, stop_ids: tuple[int, ...], constraint: Constraint | None
) -> Matcher | None:
    if constraint is None:
        return None
    return Grammars(tokenizer, stop_ids, vocab_size=session.vocab_size).matcher(constraint)


def stop_tokens(session: Session) -> tuple[int, ...]:
    """Return config.json's eos_token_id, which is one id, a list, or absent."""
    eos = session.manifest.config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def check_vocabulary(session: Session, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with ids that the engine has no embedding for."""
    if tokenizer.vocab_size > session.vocab_size:
        raise SessionError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the engine {session.vocab_size}; "
            "use the tokenizer.json of this model."
        )


def check_room(position: int, prompt: int, new: int, capacity: int) -> None:
    held = f" after {position} in the state" if position else ""
    export = f"export again with `v4graph export --max-seq-len {position + prompt + new}`"
    if position + prompt > capacity:
        raise SessionError(
            f"the prompt has {prompt} tokens{held}, the engine holds {capacity}; shorten it or {export}."
        )
    needed = position + prompt + new - 1  # the last new token is never fed back
    if needed > capacity:
        raise SessionError(
            f"{prompt} prompt tokens{held} and {new} new ones need {needed} positions, the engine holds "
            f"{capacity}; lower max_new_tokens (--max-new-tokens) to {new - (needed - capacity)} or {export}."
        )


def _last_row(logits: Logits) -> Logits:
    """Return [V] after the last token from [1, V], or from [1, S, V] of an engine with all logits."""
    return np.asarray(logits[0] if logits.ndim == 2 else logits[0, -1])
