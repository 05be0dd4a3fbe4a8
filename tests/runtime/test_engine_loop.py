import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_engine import CAPACITY, VOCAB, ToyWeights, logits_of

from v4graph.errors import BusyError, EngineError, SessionError
from v4graph_runtime import PrefixCache, SamplingOptions, Session, Tokenizer
from v4graph_runtime.serving import Engine, Generation, Limits, Piece, RequestOptions

SLOTS = 4
FREE = RequestOptions(max_new_tokens=12, stop_ids=())


@pytest.fixture
def session(engine: Path, weights: ToyWeights) -> Session:
    return Session(engine, weights, batch=SLOTS)


@pytest.fixture
def loop(session: Session, tokenizer: Tokenizer) -> Iterator[Engine]:
    with Engine(session, tokenizer, limits=Limits(max_waiting=8, prefill_tokens=7)) as engine:
        yield engine


def greedy(weights: ToyWeights, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits_of(ids, weights)[-1].argmax()))
    return ids[-count:]


def until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gate:
    """Holds the loop's next runs back until it is opened."""

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        prefill = session.prefill

        def held(*args: Any, **kwargs: Any) -> Any:
            self.entered.set()
            assert self.open.wait(10)
            return prefill(*args, **kwargs)

        monkeypatch.setattr(session, "prefill", held)


def test_a_prompt_gives_what_a_session_alone_gives(
    loop: Engine, tokenizer: Tokenizer, weights: ToyWeights
) -> None:
    expected = greedy(weights, tokenizer.encode("hello"), 12)
    generation = loop.generate("hello", FREE)
    pieces = list(generation)
    assert [piece.token for piece in pieces] == generation.ids == expected
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(expected)
    assert (generation.prompt_tokens, generation.finish) == (6, "length")
    assert loop.generate(tokenizer.encode("hello"), FREE).text() == tokenizer.decode(expected)


PROMPTS = st.lists(
    st.tuples(
        st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=40),
        st.integers(1, 20),
        st.sampled_from([0.0, 1.0]),
        st.integers(0, 5),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=PROMPTS, budget=st.integers(1, 40), cached=st.booleans())
def test_whatever_runs_beside_it_an_output_is_the_same(
    requests: list[tuple[list[int], int, float, int]],
    budget: int,
    cached: bool,
    engine: Path,
    weights: ToyWeights,
    tokenizer: Tokenizer,
) -> None:
    def options(new: int, temperature: float, seed: int) -> RequestOptions:
        return RequestOptions(new, SamplingOptions(temperature, seed=seed), stop_ids=())

    def run(slots: int, tokens: int, cache: PrefixCache | None) -> list[list[int]]:
        session = Session(engine, weights, batch=slots)
        with Engine(session, tokenizer, limits=Limits(prefill_tokens=tokens), cache=cache) as loop:
            made = [loop.submit(prompt, options(*rest)) for prompt, *rest in requests]
            for one in made:
                one.text()
            return [one.ids for one in made]

    cache = PrefixCache(interval=6) if cached else None
    for (prompt, *rest), one, other in zip(
        requests, run(SLOTS, budget, cache), run(1, 512, None), strict=True
    ):
        assert one == other or may_differ(weights, prompt, options(*rest).sampling, one, other)


def may_differ(
    weights: ToyWeights, prompt: list[int], sampling: SamplingOptions, one: list[int], other: list[int]
) -> bool:
    """Whether the first two tokens that differ are so near to the draw that rounding decides."""
    at = next(i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    logits = logits_of([*prompt, *one[:at]], weights)[-1]
    low, high = sorted((one[at], other[at]))
    if sampling.temperature == 0:
        return bool(abs(logits[low] - logits[high]) < 1e-4)
    shares = np.exp(logits - logits.max())
    drawn = np.random.default_rng(sampling.seed).random(at + 1)[at]
    return bool((np.abs(np.cumsum(shares / shares.sum())[low:high] - drawn) < 1e-4).all())


def test_more_requests_than_slots_wait_in_order(
    session: Session, tokenizer: Tokenizer, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun, put = Gate(session, monkeypatch), list[str](), Generation.put

    def noted(generation: Generation, piece: Piece) -> None:
        begun.append(generation.id)
        put(generation, piece)

    monkeypatch.setattr(Generation, "put", noted)
    with Engine(session, tokenizer, limits=Limits(max_waiting=3)) as loop:
        taken = [loop.submit("abc", FREE) for _ in range(SLOTS)]
        gate.entered.wait(5)
        until(lambda: loop.stats().running == SLOTS or loop.stats().waiting == 0)
        taken += [loop.submit("abc", FREE) for _ in range(3)]
        with pytest.raises(BusyError, match="3 requests are waiting, which is all that the engine takes"):
            loop.submit("abc", FREE)
        gate.open.set()
        assert {one.text() for one in taken} == {
            tokenizer.decode(greedy(weights, tokenizer.encode("abc"), 12))
        }
        assert [one.id for one in sorted(taken, key=lambda one: begun.index(one.id))] == [
            one.id for one in taken
        ]
        stats = loop.stats()
    assert (stats.finished, stats.refused, stats.generated_tokens) == ({"length": 7}, 1, 7 * 12)


def test_cancelled_requests_free_their_slot_at_once(
    loop: Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = session.prefill

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return prefill(*args, **kwargs)

    monkeypatch.setattr(session, "prefill", slow)
    running = loop.submit([5] * 30, RequestOptions(CAPACITY - 30, stop_ids=()))
    next(running)
    running.cancel()
    rest = list(running)
    assert running.finish == "cancelled"
    assert len(rest) < CAPACITY - 31
    until(lambda: loop.stats().running == 0)
    assert loop.submit("abc", FREE).text()


def test_a_waiting_request_can_be_cancelled_and_times_out(
    session: Session, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(session, monkeypatch)
    with Engine(session, tokenizer) as loop:
        running = [loop.submit("abc", FREE) for _ in range(SLOTS)]
        gate.entered.wait(5)
        cancelled = loop.submit("abc", FREE)
        late = loop.submit("abc", RequestOptions(12, stop_ids=(), timeout=0.01))
        cancelled.cancel()
        time.sleep(0.02)
        gate.open.set()
        assert cancelled.text() == late.text() == ""
        assert cancelled.finish == late.finish == "cancelled"
        assert all(one.text() for one in running)


def test_a_stop_text_ends_the_output(loop: Engine, tokenizer: Tokenizer, weights: ToyWeights) -> None:
    whole = tokenizer.decode(greedy(weights, tokenizer.encode("hello"), 12))
    generation = loop.generate("hello", RequestOptions(12, stop=(whole[5:7],), stop_ids=()))
    assert generation.text() == whole[: whole.index(whole[5:7])]
    assert generation.finish == "stop"


def test_logprobs_are_the_models(loop: Engine, tokenizer: Tokenizer, weights: ToyWeights) -> None:
    ids = tokenizer.encode("hello")
    biased = SamplingOptions(logit_bias={7: 50.0})
    [piece] = list(loop.generate("hello", RequestOptions(1, biased, stop_ids=(), logprobs=3)))
    logits = logits_of(ids, weights)[-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    assert piece.token == 7 and piece.logprob is not None
    assert piece.logprob.logprob == pytest.approx(expected[7], abs=1e-5)
    best = np.argsort(-logits, kind="stable")[:3]
    assert [token for token, _ in piece.logprob.top] == best.tolist()


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], FREE, "the prompt is empty"),
        ([3, VOCAB], FREE, "prompt token 1 is 23, outside the vocabulary, 0 to 22"),
        ([3] * 65, FREE, "the prompt has 65 tokens, the engine holds 64"),
        ([3] * 60, FREE, "60 prompt tokens and 12 new ones need 71 positions"),
        ([3], RequestOptions(sampling=SamplingOptions(logit_bias={99: 1.0})), "logit_bias names token 99"),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    loop: Engine, prompt: list[int], options: RequestOptions, message: str
) -> None:
    with pytest.raises(SessionError, match=message):
        loop.submit(prompt, options)
    assert loop.stats().waiting == loop.stats().running == 0


def test_a_failing_run_fails_its_requests_and_the_loop_goes_on(
    session: Session, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failing = session._backend.run, threading.Event()  # type: ignore[union-attr]

    def maybe(*args: Any, **kwargs: Any) -> None:
        if failing.is_set():
            raise EngineError("onnxruntime failed while running the graph: out of memory")
        run(*args, **kwargs)

    monkeypatch.setattr(session._backend, "run", maybe)
    with Engine(session, tokenizer) as loop:
        failing.set()
        generation = loop.submit("abc", FREE)
        with pytest.raises(EngineError, match="out of memory"):
            generation.text()
        assert generation.finish == "error"
        failing.clear()
        assert loop.submit("abc", FREE).text()


def test_logits_that_are_no_numbers_are_the_engines_fault(
    loop: Engine, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = session.prefill

    def broken(*args: Any, **kwargs: Any) -> Any:
        return np.full_like(prefill(*args, **kwargs), np.nan)

    with monkeypatch.context() as patch:
        patch.setattr(session, "prefill", broken)
        with pytest.raises(EngineError, match="overflowed or its weights are broken"):
            loop.submit("abc", FREE).text()
    assert loop.submit("abc", FREE).text()


def test_a_defect_is_logged_and_does_not_stop_the_loop(
    loop: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from v4graph_runtime.serving.running import Running

    with monkeypatch.context() as patch:
        patch.setattr(Running, "take", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="the engine loop failed"):
            loop.submit("abc", FREE).text()
    assert "ZeroDivisionError" in caplog.text
    assert loop.submit("abc", FREE).text()


def test_closing_drains_or_cancels(session: Session, tokenizer: Tokenizer) -> None:
    loop = Engine(session, tokenizer)
    first = loop.submit("abc", FREE)
    loop.close(drain=10)
    assert first.finish == "length"
    with pytest.raises(BusyError, match="closing"):
        loop.submit("abc", FREE)
    loop = Engine(session, tokenizer)
    long = [loop.submit("a" * 20, RequestOptions(40, stop_ids=())) for _ in range(2 * SLOTS)]
    loop.close()
    assert {one.finish for one in long} <= {"cancelled", "length"}
    assert long[-1].finish == "cancelled"


def test_async_callers_share_the_engine(loop: Engine, tokenizer: Tokenizer, weights: ToyWeights) -> None:
    async def one(prompt: str) -> str:
        return "".join([piece.text async for piece in loop.generate(prompt, FREE)])

    async def all_of(prompts: list[str]) -> list[str]:
        return await asyncio.gather(*map(one, prompts))

    prompts = ["abc", "hello", "stu" * 8]
    expected = [tokenizer.decode(greedy(weights, tokenizer.encode(text), 12)) for text in prompts]
    assert asyncio.run(all_of(prompts)) == expected


def test_a_kept_prefix_is_not_read_again(session: Session, tokenizer: Tokenizer, weights: ToyWeights) -> None:
    prompt = list(np.random.default_rng(3).integers(2, VOCAB, 40))
    with Engine(session, tokenizer, cache=PrefixCache(interval=8)) as loop:
        loop.submit([*prompt, 5], FREE).text()
        again = loop.submit([*prompt, 6, 7], FREE)
        again.text()
    assert again.ids == greedy(weights, [*prompt, 6, 7], 12)
    assert again.cached_tokens >= 38


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(SessionError, match="prefill_tokens is 0, expected at least 1"):
        Limits(prefill_tokens=0)
