"""Token ids to the text and bytes that each one stands for, as log probabilities name them."""

from __future__ import annotations

from typing import Any

from v4graph_runtime.request import TokenLogprob
from v4graph_runtime.tokenizer import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Return the characters that byte-level BPE writes bytes as: itself if printable, else from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {chr(byte): byte for byte in printable}
    return shown | {chr(256 + i): byte for i, byte in enumerate(others)}


ALPHABET = _byte_alphabet()


class TokenTexts:
    """Bytes and text of single tokens of a byte-level tokenizer; an added token is its own text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._core = tokenizer.core
        self._added = {id_: token.content for id_, token in self._core.get_added_tokens_decoder().items()}

    def bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return str(self._added[token]).encode()
        written = self._core.id_to_token(token) or ""
        if all(letter in ALPHABET for letter in written):
            return bytes(ALPHABET[letter] for letter in written)
        return written.encode()

    def text_of(self, token: int) -> str:
        """Return a token's text; U+FFFD stands for a part of a character."""
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        r"""Return a text that no other token has: bytes:\xe2 is a part of a character."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat_logprob(self, chosen: TokenLogprob) -> dict[str, Any]:
        """Return an entry of a chat answer's logprobs."""
        top = [self._entry(token, value) for token, value in chosen.top]
        return {**self._entry(chosen.token, chosen.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.text_of(token), "logprob": finite(logprob), "bytes": [*self.bytes_of(token)]}


def finite(logprob: float) -> float:
    """Return a number that JSON has: a probability of 0 has none, and OpenAI writes this for it."""
    return max(logprob, -9999.0)
