from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_engine import CAPACITY, VOCAB, ToyWeights, logits_of

from v4graph.errors import SessionError
from v4graph_runtime import GenerateOptions, Session, Tokenizer, stream
from v4graph_runtime.sampling import Sampler
from v4graph_runtime.sampling_options import SamplingOptions


@pytest.fixture(params=["engine", "all_logits_engine"])
def session(request: pytest.FixtureRequest, weights: ToyWeights) -> Session:
    return Session(request.getfixturevalue(request.param), weights)


def greedy(weights: ToyWeights, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(ids, weights)[-1].argmax()))
    return ids[-count:]


def test_greedy_text_is_the_models(session: Session, tokenizer: Tokenizer, weights: ToyWeights) -> None:
    expected = greedy(weights, tokenizer.encode("hello"), 20)
    pieces = stream(session, tokenizer, "hello", GenerateOptions(max_new_tokens=20, stop_ids=()))
    assert "".join(pieces) == tokenizer.decode(expected)
    assert pieces.ids == expected
    assert session.position.tolist() == [6 + 19]
    assert (pieces.stats.prompt_tokens, pieces.stats.new_tokens, pieces.stats.finish) == (6, 20, "length")
    assert pieces.stats.state_bytes == session.state_bytes > 0
    assert pieces.stats.time_to_first_token > 0
    assert pieces.stats.tokens_per_second == 19 / pieces.stats.decode_seconds


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(
    session: Session, tokenizer: Tokenizer, weights: ToyWeights
) -> None:
    expected = greedy(weights, tokenizer.encode("hello"), 20)
    stop = expected[4]
    pieces = stream(session, tokenizer, "hello", GenerateOptions(20, stop_ids=(stop,)))
    assert "".join(pieces) == tokenizer.decode(expected[: expected.index(stop)])
    assert pieces.stats.finish == "stop"


def test_a_stop_text_ends_the_text_and_is_not_part_of_it(
    session: Session, tokenizer: Tokenizer, weights: ToyWeights
) -> None:
    expected = tokenizer.decode(greedy(weights, tokenizer.encode("hello"), 20))
    stop = expected[7:10]
    options = GenerateOptions(20, stop_ids=(), stop=(stop, "never"))
    pieces = stream(session, tokenizer, "hello", options)
    assert "".join(pieces) == expected[: expected.index(stop)]
    assert (pieces.stats.finish, len(pieces.ids)) == ("stop", expected.index(stop) + 3)
    # No token is computed behind it, also where it ends with the last one that was asked for.
    assert session.position.tolist() == [6 + expected.index(stop) + 2]
    session.reset()
    last = stream(session, tokenizer, "hello", GenerateOptions(len(pieces.ids), stop_ids=(), stop=(stop,)))
    assert "".join(last) == expected[: expected.index(stop)]
    assert last.stats.finish == "stop"


def test_text_that_only_began_a_stop_comes_at_the_end(
    session: Session, tokenizer: Tokenizer, weights: ToyWeights
) -> None:
    expected = tokenizer.decode(greedy(weights, tokenizer.encode("hello"), 5))
    pieces = stream(session, tokenizer, "hello", GenerateOptions(5, stop_ids=(), stop=(expected + "a",)))
    assert list(pieces) == [expected]
    assert pieces.stats.finish == "length"


def test_every_option_reaches_the_sampler(
    session: Session, tokenizer: Tokenizer, weights: ToyWeights
) -> None:
    chosen: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "seed": 4}
    chosen |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    chosen |= {"logit_bias": {5: 2.0}}
    ids = tokenizer.encode("hello")
    sample, output = Sampler(SamplingOptions(**chosen), ids), []
    for _ in range(20):
        output.append(sample(logits_of([*ids, *output], weights)[-1].astype(np.float32)))
    pieces = stream(session, tokenizer, "hello", GenerateOptions(20, stop_ids=(), **chosen))
    list(pieces)
    assert pieces.ids == output


def test_the_configs_end_token_stops_by_default(
    session: Session, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> Any:
        return np.eye(1, VOCAB, 1, np.float32)

    monkeypatch.setattr(session, "prefill", end)
    pieces = stream(session, tokenizer, "hello", GenerateOptions(9))
    assert list(pieces) == []
    assert (pieces.stats.finish, pieces.stats.new_tokens) == ("stop", 0)


def test_a_seed_fixes_the_text(session: Session, tokenizer: Tokenizer) -> None:
    def text(seed: int) -> str:
        session.reset()
        return "".join(stream(session, tokenizer, "hello", GenerateOptions(30, 1.5, 0.9, seed, ())))

    assert text(1) == text(1) != text(2)


def test_a_second_prompt_goes_on_from_the_state(session: Session, tokenizer: Tokenizer) -> None:
    list(stream(session, tokenizer, "abc", GenerateOptions(1, stop_ids=())))
    pieces = stream(session, tokenizer, "de", GenerateOptions(1, stop_ids=()))
    assert pieces.stats.prompt_tokens == 2
    list(pieces)
    assert session.position.tolist() == [6]


def test_all_of_the_capacity_can_be_used(session: Session, tokenizer: Tokenizer) -> None:
    pieces = stream(session, tokenizer, "a" * 10, GenerateOptions(CAPACITY - 10, stop_ids=()))
    list(pieces)
    assert (session.position.tolist(), pieces.stats.new_tokens) == ([CAPACITY], CAPACITY - 10)


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        ("a" * 64, 5, r"the prompt has 65 tokens, the engine holds 64; .* `v4graph export --max-seq-len 70`"),
        (
            "a" * 60,
            5,
            r"61 prompt tokens and 5 new ones need 65 positions, .* \(--max-new-tokens\) to 4 or",
        ),
        ("a", 0, "max_new_tokens is 0"),
    ],
)
def test_a_text_without_room_is_refused_before_it_starts(
    session: Session, tokenizer: Tokenizer, prompt: str, new: int, message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        stream(session, tokenizer, prompt, GenerateOptions(new))
    assert session.position.tolist() == [0]


def test_other_bad_calls_are_refused_before_the_first_token(
    engine: Path, weights: ToyWeights, tokenizer: Tokenizer, byte_tokenizer: Tokenizer
) -> None:
    session = Session(engine, weights)
    with pytest.raises(SessionError, match="the tokenizer has 258 tokens and the engine 23"):
        stream(session, byte_tokenizer, "a", GenerateOptions())
    with pytest.raises(SessionError, match="temperature is -1"):
        stream(session, tokenizer, "a", GenerateOptions(temperature=-1))
    with pytest.raises(SessionError, match="logit_bias names token 23, expected token ids from 0 to 22"):
        stream(session, tokenizer, "a", GenerateOptions(logit_bias={23: 1.0}))
    with pytest.raises(SessionError, match="stop holds an empty text"):
        stream(session, tokenizer, "a", GenerateOptions(stop=("",)))
    with pytest.raises(SessionError, match="the prompt is empty"):
        stream(session, Tokenizer(tokenizer.core), "", GenerateOptions())
    with pytest.raises(SessionError, match="batch 1, this one has 2"):
        stream(Session(engine, weights, batch=2), tokenizer, "a", GenerateOptions())
