"""tokenizer.json to token ids and back, with incremental text that is never broken UTF-8."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from v4graph.errors import SessionError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

# A decoder writes this for bytes that are no character, so also for one that is not complete yet.
REPLACEMENT = "\ufffd"
# A character has at most 4 bytes and a token at least one, so so many tokens hold the last character.
CONTEXT = 4


class Tokenizer:
    """A byte-level BPE tokenizer and the token that starts every text, if the model has one."""

    def __init__(self, core: tokenizers.Tokenizer, bos_id: int | None = None) -> None:
        self.core = core
        self.bos_id = bos_id

    @classmethod
    def load(cls, *directories: str | Path | None) -> Tokenizer:
        """Load tokenizer.json from the first directory that has one; None is skipped.

        The text starts with tokenizer_config.json's bos_token. Its add_bos_token is not read: V4's
        says false because its chat template writes the token itself.

        Raises:
            SessionError: no tokenizer.json, one that cannot be read, or tokenizers is not installed.
        """
        try:
            from tokenizers import Tokenizer as Core
        except ImportError as error:
            raise SessionError(
                "tokenizers is not installed; install it with `pip install 'v4graph[ort]'`."
            ) from error
        folders = [Path(directory) for directory in directories if directory is not None]
        for folder in folders:
            path = folder / TOKENIZER
            if path.is_file():
                try:
                    core = Core.from_file(str(path))
                except Exception as error:  # tokenizers raises Exception itself
                    raise SessionError(f"{path}: cannot be read as a tokenizer ({error}).") from error
                return cls(core, _bos_id(core, folder / TOKENIZER_CONFIG))
        places = " or ".join(map(str, folders))
        raise SessionError(f"no {TOKENIZER} in {places}; copy the model's tokenizer.json there.")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.core.get_vocab_size(with_added_tokens=True))

    def knows(self, token: str) -> bool:
        """Whether this text is one token."""
        return self.core.token_to_id(token) is not None

    def encode(self, text: str, *, start: bool = True) -> list[int]:
        """Return token ids; at the start of a text the BOS token comes first, once.

        Raises:
            SessionError: half of a surrogate pair, which bytes that are no UTF-8 become in arguments.
        """
        try:
            ids = list(self.core.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            half = next((letter for letter in text if 0xD800 <= ord(letter) < 0xE000), None)
            if half is None:
                raise
            raise SessionError(
                f"the text is not valid Unicode: U+{ord(half):04X} at {text.index(half)} is half of a "
                "character; replace it."
            ) from error
        if start and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Return text, special tokens left out unless asked for."""
        return str(self.core.decode(list(ids), skip_special_tokens=not special_tokens))


class IncrementalText:
    """Token ids one by one to pieces of text that join to the decoded whole.

    A piece is held back while its last character is incomplete. The decoder sees the tokens of the
    previous piece too, because some decoders write a token differently at the start of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), special_tokens: bool = False
    ) -> None:
        """Start after `context`, tokens whose text is out already; `special_tokens`: they are text too."""
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._done = list(context[-CONTEXT:])
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that this token completes, often none or one word."""
        self._pending.append(token)
        text = self._text()
        return "" if text.endswith(REPLACEMENT) else self._take(text)

    def flush(self) -> str:
        """Return what is left at the end; an incomplete character becomes U+FFFD."""
        return self._take(self._text())

    def _text(self) -> str:
        before = self._tokenizer.decode(self._done, self._special_tokens)
        return self._tokenizer.decode(self._done + self._pending, self._special_tokens)[len(before) :]

    def _take(self, text: str) -> str:
        # Special tokens have no text: keep what went before them as context.
        self._done = self._pending if text else self._done + self._pending
        self._pending = []
        return text


def _bos_id(core: tokenizers.Tokenizer, path: Path) -> int | None:
    try:
        token: Any = json.loads(path.read_text("utf-8")).get("bos_token")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise SessionError(f"{path}: not a JSON object ({error}).") from error
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return None
    found = core.token_to_id(token)
    if found is None:
        raise SessionError(f"{path}: bos_token '{token}' is not in {TOKENIZER}.")
    return int(found)
