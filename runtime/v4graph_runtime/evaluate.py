"""Held-out text to bits per byte, teacher-forced: the model always sees the true tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from v4graph.errors import SessionError
from v4graph_runtime.arguments import Ids
from v4graph_runtime.generate import check_vocabulary
from v4graph_runtime.session import Logits, Session
from v4graph_runtime.tokenizer import Tokenizer

# Tokens whose logits are held at once: [1, PIECE, V] floats.
PIECE = 256


@dataclass(frozen=True)
class Score:
    """Bits that a model needs for a text. `hits`: tokens that it held most likely."""

    bits: float
    bytes: int
    tokens: int
    hits: int

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, unlike perplexity."""
        return self.bits / self.bytes


def bits_per_byte(session: Session, tokenizer: Tokenizer, text: str) -> float:
    """Return `score(...).bits_per_byte`."""
    return score(session, tokenizer, text).bits_per_byte


def score(session: Session, tokenizer: Tokenizer, text: str, window: int | None = None) -> Score:
    """Score every token of a text given those before it.

    A text longer than `window` tokens (default: the engine's capacity) is cut into windows with
    nothing in common but one token, the last of a window, which is also the first of the next. With
    no BOS token nothing predicts the first token: it is charged as uniform over the vocabulary.
    The session's state is lost.

    Raises:
        SessionError: an engine without all logits, a batch other than 1, an empty text, or a window
            that the state cannot hold.
    """
    if not session.manifest.all_logits:
        raise SessionError(
            f"{session.engine_dir}: this engine returns logits of the last token only; "
            "export with `--all-logits` to score a text."
        )
    if session.batch != 1:
        raise SessionError(f"a text is scored by a session of batch 1, this one has {session.batch}.")
    check_vocabulary(session, tokenizer)
    window = session.capacity if window is None else window
    if not 1 <= window <= session.capacity:
        raise SessionError(f"window is {window} tokens, the engine holds 1 to {session.capacity}.")
    ids = np.asarray(tokenizer.encode(text), np.int64)
    size = len(text.encode())
    if size == 0:
        raise SessionError("the text is empty, there is nothing to score.")
    bits = (
        0.0 if tokenizer.bos_id is not None and ids[0] == tokenizer.bos_id else math.log2(session.vocab_size)
    )
    hits = 0
    for inputs, targets in _windows(ids, window):
        session.reset()
        for start in range(0, len(inputs), PIECE):
            logits = session.prefill(inputs[None, start : start + PIECE])[0]
            wanted = targets[start : start + PIECE]
            bits -= float(_log2_probabilities(logits, wanted).sum())
            hits += int((logits.argmax(-1) == wanted).sum())
    return Score(bits, size, len(ids) - 1, hits)


def _windows(ids: Ids, window: int) -> Iterator[tuple[Ids, Ids]]:
    for start in range(0, len(ids) - 1, window):
        stop = min(start + window, len(ids) - 1)
        yield ids[start:stop], ids[start + 1 : stop + 1]


def _log2_probabilities(logits: Logits, targets: Ids) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return log2 p(target) of each row, in float64: errors of a long text add up."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1))
    picked = np.take_along_axis(shifted, targets[:, None], -1)[:, 0]
    return np.asarray((picked - total) / math.log(2))
