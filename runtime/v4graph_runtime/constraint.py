"""A JSON schema or a regular expression to the tokens that may come next, by llguidance.

A grammar is compiled once and copied per text; a mask takes tens of microseconds for most tokens.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError
from v4graph_runtime.request import Constraint
from v4graph_runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Between the parts of JSON: nothing, a space, or a new line and its indent, so that a pretty-printed text is
# possible. JSON allows any number, and a weak model that has begun with white space never comes back.
WHITESPACE = r" |\n[ \t]{0,32}"
# Compiled grammars that are kept. A grammar of a large schema takes megabytes.
KEPT = 32


class Grammars:
    """Compiles constraints for one tokenizer and keeps them; may be used from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Sequence[int], *, vocab_size: int | None = None
    ) -> None:
        """Mask `vocab_size` tokens, the engine's; default: the tokenizer's."""
        self._tokenizer = tokenizer
        self._stop_ids = tuple(stop_ids)
        self._vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        self._vocabulary: _Vocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint, stop_ids: Sequence[int] | None = None) -> Matcher:
        """Return a matcher at the start of an output; `stop_ids` are other ones than the usual.

        Raises:
            SessionError: llguidance is not installed or refuses the constraint, whose reason is the
                error's detail, or `after` is no single token.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary.of(self._tokenizer, self._stop_ids, self._vocab_size)
        after = self._after(constraint)
        core = self._grammar(self._vocabulary.core, constraint)
        return Matcher(core, self._vocabulary, self._stop_ids if stop_ids is None else stop_ids, after)

    def _after(self, constraint: Constraint) -> int | None:
        if not constraint.after:
            return None
        token = self._tokenizer.core.token_to_id(constraint.after)
        if token is None:
            raise SessionError(
                f"the constraint begins after '{constraint.after}', which is not one token of this "
                "tokenizer; expected a token as '</think>', or none to begin at once."
            )
        return int(token)

    def _grammar(self, tokenizer: llguidance.LLTokenizer, constraint: Constraint) -> llguidance.LLMatcher:
        key = (constraint.kind, constraint.text)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key].deep_copy()
        # Outside the lock: a large schema takes a second, in which other texts begin.
        grammar = _compile(tokenizer, constraint)
        with self._lock:
            self._compiled[key] = grammar
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return grammar.deep_copy()


class Matcher:
    """Follows one output token by token."""

    def __init__(
        self,
        core: llguidance.LLMatcher,
        vocabulary: _Vocabulary,
        stop_ids: Sequence[int],
        after: int | None = None,
    ) -> None:
        self._core = core
        self._vocabulary = vocabulary
        self._stop_ids = frozenset(stop_ids)
        self._stop = np.array([i for i in stop_ids if i < vocabulary.size], np.int64)
        self._after = after
        self._mask: Mask | None = None
        self._finished = False

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but a stop id."""
        self.allowed()
        return self._finished

    def allowed(self) -> Mask | None:
        """Return which tokens may come next, bool [V], not to be written to; None: any.

        Stop ids are allowed exactly where the output may end. With no stop ids none is allowed once
        `finished`.

        Raises:
            SessionError: the constraint became too complex, or the tokenizer cannot write what it asks for.
        """
        if self._after is None and self._mask is None:
            self._mask = self._compute()
        return self._mask

    def accept(self, token: int) -> None:
        """Go on behind a token; a stop id ends the output and changes nothing.

        Raises:
            SessionError: a token that is not allowed.
        """
        if self._after is not None:
            self._after = None if token == self._after else self._after
        elif token not in self._stop_ids:
            self._mask = None
            if not self._core.consume_token(int(token)):
                self._fail(f"token {token} does not match the constraint")

    def _compute(self) -> Mask:
        words = np.frombuffer(self._core.compute_bitmask(), np.uint8)
        may_end = self._core.is_accepting()
        mask = self._vocabulary.mask(words)
        # A stop id that is a word otherwise: as the output's end it cannot be a part of it.
        mask[self._stop] = False
        self._finished = not mask.any()
        if self._core.is_error() or (self._finished and not may_end):
            self._fail("the constrained output cannot go on, though it is not complete")
        mask[self._stop] = may_end
        mask.flags.writeable = False
        return mask

    def _fail(self, what: str) -> NoReturn:
        # Behind <state> the library tells its maintainers about its inside.
        reason = self._core.get_error().partition("<state>")[0].strip()
        reason = reason or "no token of the tokenizer is allowed here"
        raise SessionError(f"{what}; simplify the schema or the pattern.", detail=reason)


@dataclass(frozen=True)
class _Vocabulary:
    """The tokenizer as llguidance has it; `never` are tokens that are no text, `size` is the engine's V."""

    core: llguidance.LLTokenizer
    never: Ids
    size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, stop_ids: Sequence[int], size: int) -> _Vocabulary:
        try:
            import llguidance
        except ImportError as error:
            raise SessionError(
                "llguidance is not installed, which constrains an output to a schema or a pattern; "
                "install it with `pip install 'v4graph[serve]'`."
            ) from error
        # V4 marks most of its control tokens, as <｜User｜>, as if they were words. None of them belongs into
        # a JSON string, and byte-level tokenizers can write their texts with others.
        added = sorted(tokenizer.core.get_added_tokens_decoder())
        # Any end will do: `Matcher` sets the stop ids itself. But there has to be one.
        ends = [i for i in stop_ids if i < tokenizer.vocab_size] or added[:1] or None
        try:
            core = llguidance.LLTokenizer(tokenizer.core.to_str(), eos_token=ends)
        except ValueError as error:
            raise SessionError(
                "llguidance cannot read this tokenizer, so no output can be constrained with it; "
                "expected a byte-level BPE tokenizer.",
                detail=str(error),
            ) from error
        never = [i for i in (*added, *core.eos_tokens) if i < size]
        return cls(core, np.array(never, np.int64), size)

    def mask(self, words: npt.NDArray[np.uint8]) -> Mask:
        """Return bool [V] from one bit per token of the tokenizer."""
        count = min(self.core.vocab_size, self.size)
        mask = np.zeros(self.size, np.bool_)
        mask[:count] = np.unpackbits(words, count=count, bitorder="little")
        mask[self.never] = False
        return mask


def _compile(tokenizer: llguidance.LLTokenizer, constraint: Constraint) -> llguidance.LLMatcher:
    """Return a matcher at its start, to be copied."""
    import llguidance

    what = f"the regular expression {_short(constraint.text)!r}"
    if constraint.kind != "regex":
        what = f"the JSON schema {_short(constraint.text)}"
    try:
        grammar = _grammar_text(constraint)
        core = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        reason = core.get_error()
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{what} cannot be read; correct what is said here:", detail=str(error)) from error
    if reason:
        raise SessionError(
            f"{what} cannot constrain an output; correct or leave out what is said here:",
            detail=reason.rstrip(),
        )
    return core


def _grammar_text(constraint: Constraint) -> str:
    import llguidance

    if constraint.kind == "regex":
        if (len(constraint.text) - len(constraint.text.rstrip("\\"))) % 2:
            raise ValueError("it ends with a backslash that escapes nothing")  # llguidance drops it
        return llguidance.LLMatcher.grammar_from_regex(constraint.text)
    # Read and written again: llguidance would paste the text into its own JSON as it is.
    text = constraint.text if constraint.kind == "json_schema" else '{"type": "object"}'
    schema = json.loads(text, parse_constant=_no_number)
    # The schema `true` is the same as an empty one, but has no place for the pattern.
    return llguidance.LLMatcher.grammar_from_json_schema(
        json.dumps({} if schema is True else schema), defaults={"whitespace_pattern": WHITESPACE}
    )


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
