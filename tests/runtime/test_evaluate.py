import math
from pathlib import Path

import numpy as np
import pytest
from toy_engine import CAPACITY, VOCAB, ToyWeights, logits_of

from v4graph.errors import SessionError
from v4graph_runtime import Session, Tokenizer, bits_per_byte, evaluate, score

TEXT = "".join(chr(ord("a") + i) for i in np.random.default_rng(5).integers(0, 20, 150))


@pytest.fixture
def session(all_logits_engine: Path, weights: ToyWeights) -> Session:
    return Session(all_logits_engine, weights)


def expected_bits(weights: ToyWeights, ids: list[int], window: int) -> float:
    bits = 0.0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        logits = logits_of(part, weights)
        logits -= logits.max(-1, keepdims=True)
        logs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))) / math.log(2)
        bits -= sum(logs[t, part[t + 1]] for t in range(len(part) - 1))
    return bits


@pytest.mark.parametrize("window", [None, 1, 40, CAPACITY])
@pytest.mark.parametrize("piece", [7, 256])
def test_bits_are_those_of_the_model_over_every_token_once(
    session: Session,
    tokenizer: Tokenizer,
    weights: ToyWeights,
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    piece: int,
) -> None:
    monkeypatch.setattr(evaluate, "PIECE", piece)
    ids = tokenizer.encode(TEXT)
    result = score(session, tokenizer, TEXT, window)
    assert (result.tokens, result.bytes) == (len(TEXT), len(TEXT))
    assert result.bits == pytest.approx(expected_bits(weights, ids, window or CAPACITY), rel=1e-5)
    assert 0 <= result.hits < result.tokens


def test_the_state_of_the_session_does_not_matter(session: Session, tokenizer: Tokenizer) -> None:
    first = bits_per_byte(session, tokenizer, TEXT)
    assert bits_per_byte(session, tokenizer, TEXT) == first
    assert first == score(session, tokenizer, TEXT).bits / len(TEXT)


def test_without_a_start_token_the_first_token_is_charged_as_uniform(
    session: Session, tokenizer: Tokenizer, weights: ToyWeights
) -> None:
    bare = Tokenizer(tokenizer.core)
    bits = expected_bits(weights, bare.encode("hello"), CAPACITY) + math.log2(VOCAB)
    assert score(session, bare, "hello").bits == pytest.approx(bits, rel=1e-5)
    assert score(session, bare, "h").bits == math.log2(VOCAB)


def test_what_cannot_be_scored_is_refused(
    session: Session, engine: Path, all_logits_engine: Path, weights: ToyWeights, tokenizer: Tokenizer
) -> None:
    with pytest.raises(SessionError, match=r"logits of the last token only; export with `--all-logits`"):
        bits_per_byte(Session(engine, weights), tokenizer, "a")
    with pytest.raises(SessionError, match="batch 1, this one has 2"):
        bits_per_byte(Session(all_logits_engine, weights, batch=2), tokenizer, "a")
    with pytest.raises(SessionError, match="the text is empty"):
        bits_per_byte(session, tokenizer, "")
    with pytest.raises(SessionError, match="window is 65 tokens, the engine holds 1 to 64"):
        score(session, tokenizer, "a", 65)
