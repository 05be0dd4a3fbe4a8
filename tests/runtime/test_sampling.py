import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v4graph.errors import SessionError
from v4graph_runtime.sampling import Sampler, largest, token_logprob
from v4graph_runtime.sampling_options import SamplingOptions

SHARES = [0.1, 0.5, 0.05, 0.35]
LOGITS = np.log(np.array(SHARES, np.float32))
INF = math.inf


def sampler(temperature: float = 0.0, prompt: Any = (), **options: Any) -> Sampler:
    return Sampler(SamplingOptions(temperature, **options), prompt)


def drawn(sample: Sampler, count: int = 4000, logits: Any = LOGITS, allowed: Any = None) -> np.ndarray:
    return np.bincount([sample(logits, allowed) for _ in range(count)], minlength=len(logits)) / count


def row(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_temperature_zero_takes_the_best_and_ties_go_to_the_lowest_id() -> None:
    assert sampler()(LOGITS) == 1
    assert sampler()(row(0, 2, 2, 1)) == 1


def test_samples_follow_the_probabilities() -> None:
    np.testing.assert_allclose(drawn(sampler(1.0, seed=3)), SHARES, atol=0.03)


def test_temperature_sharpens() -> None:
    powers = np.array(SHARES) ** 2
    np.testing.assert_allclose(drawn(sampler(0.5, seed=3)), powers / powers.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        *[({"top_p": p}, kept) for p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}))],
        *[({"top_k": k}, kept) for k, kept in ((1, {1}), (2, {1, 3}), (4, {0, 1, 2, 3}), (9, {0, 1, 2, 3}))],
        *[({"min_p": p}, kept) for p, kept in ((1.0, {1}), (0.6, {1, 3}), (0.15, {0, 1, 3}))],
        # Each step takes its share of what the step before left: 0.5 of 0.85 is below 0.6.
        ({"top_k": 2, "top_p": 0.58}, {1}),
        ({"top_k": 3, "top_p": 0.58}, {1, 3}),
        ({"top_k": 3, "top_p": 0.58, "min_p": 0.8}, {1}),
        # The nucleus is of all tokens, so min-p comes too late to make it smaller.
        ({"top_p": 0.93, "min_p": 0.1}, {0, 1, 3}),
    ],
)
def test_the_most_likely_tokens_are_kept(options: dict[str, Any], kept: set[int]) -> None:
    shares = drawn(sampler(1.0, seed=5, **options), 1000)
    assert set(np.flatnonzero(shares)) == kept


def test_top_k_keeps_no_more_where_tokens_tie_and_takes_the_lowest_ids() -> None:
    assert set(np.flatnonzero(drawn(sampler(1.0, top_k=3, seed=0), 500, row(0, 1, 0, 0, 0)))) == {0, 1, 2}


def test_a_wide_nucleus_is_found_too() -> None:
    sample = sampler(1.0, top_p=0.5, seed=0)
    assert max(sample(np.zeros(5000, np.float32)) for _ in range(500)) in range(2300, 2500)


@given(st.lists(st.sampled_from([-INF, -1.0, 0.0, 0.5, 3.0]), min_size=1), st.integers(1, 20))
def test_the_largest_are_those_of_a_stable_sort(values: list[float], count: int) -> None:
    array = np.array(values)
    assert largest(array, count).tolist() == np.argsort(-array, kind="stable")[:count].tolist()


def test_logit_bias_chooses_and_forbids_tokens() -> None:
    assert sampler(logit_bias={2: 50.0})(LOGITS) == 2
    assert sampler(logit_bias={1: -100.0})(LOGITS) == 3


def test_repetition_penalty_divides_positive_logits_and_multiplies_others() -> None:
    assert sampler(repetition_penalty=2.0, prompt=[0, 0])(row(2.0, 1.5)) == 1
    assert sampler(repetition_penalty=2.0, prompt=[0, 1])(row(2.0, 1.5, 1.2)) == 2
    assert sampler(repetition_penalty=2.0, prompt=[0])(row(-1.0, -1.5)) == 1
    sample = sampler(repetition_penalty=2.0, prompt=[0])
    assert [sample(row(-1, -1.5, -3.5)) for _ in range(3)] == [1, 0, 0]


def test_presence_and_frequency_look_at_the_output_only() -> None:
    logits = row(2.0, 1.5, 0)
    sample = sampler(presence_penalty=1.0, prompt=[0, 0])
    assert [sample(logits) for _ in range(5)] == [0, 1, 0, 0, 0]
    sample = sampler(frequency_penalty=0.3, prompt=[0, 0])
    assert [sample(logits) for _ in range(6)] == [0, 0, 1, 0, 1, 0]


def test_penalties_follow_a_bias() -> None:
    assert sampler(repetition_penalty=4.0, logit_bias={0: 3.0}, prompt=[0])(row(-1.0, 0.4)) == 0
    assert sampler(repetition_penalty=8.0, logit_bias={0: 3.0}, prompt=[0])(row(-1.0, 0.4)) == 1


@settings(max_examples=50)
@given(st.data())
def test_penalties_are_those_of_the_whole_text(data: st.DataObject) -> None:
    token = st.integers(0, 199)
    prompt, output = data.draw(st.lists(token)), data.draw(st.lists(token, max_size=150))
    logits = np.random.default_rng(len(output)).standard_normal(200).astype(np.float32) * 3
    options = SamplingOptions(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2)
    sample = Sampler(options, prompt)
    for one in output:
        sample(np.eye(1, 200, one, np.float32)[0] * 1e30)
    expected = logits.astype(np.float64)
    for one in {*prompt, *output}:
        expected[one] = expected[one] / 1.3 if expected[one] > 0 else expected[one] * 1.3
        expected[one] -= 0.4 * (one in output) - 0.2 * output.count(one)
    assert sample(logits) == expected.argmax()


def test_the_same_seed_gives_the_same_tokens() -> None:
    samplers = (sampler(1.0, seed=seed) for seed in (1, 1, 2))
    tokens = [[sample(LOGITS) for _ in range(50)] for sample in samplers]
    assert tokens[0] == tokens[1] != tokens[2]


def test_one_random_number_is_taken_per_token() -> None:
    first, second = sampler(1.0, seed=1), sampler(1.0, seed=1)
    for logits, allowed in ((LOGITS, None), (row(0, -INF, -INF, -INF), None), (LOGITS, np.arange(4) == 2)):
        first(LOGITS)
        second(logits, allowed)
    assert [first(LOGITS) for _ in range(50)] == [second(LOGITS) for _ in range(50)]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.1}])
def test_extreme_values_do_not_overflow(options: dict[str, Any]) -> None:
    for temperature in (5e-324, 1e-300):
        assert sampler(temperature, seed=0, **options)(row(-3e38, 3e38, 0)) == 1
        assert sampler(temperature, seed=0, **options)(row(0, -INF, 1e-30)) in (0, 2)
    assert sampler(1e308, seed=0, **options)(row(-INF, 3e38, -INF)) == 1
    assert sampler(1.0, seed=0, **options)(row(-INF, 0, -INF)) == 1
    for penalty in (5e-324, 1e308):
        sample = sampler(1.0, [0, 1, 2], seed=0, repetition_penalty=penalty, presence_penalty=100, **options)
        assert {sample(row(3e38, -3e38, -INF)) for _ in range(9)} <= {0, 1}


def test_a_token_of_no_weight_is_never_drawn() -> None:
    sample = sampler(1.0, seed=0)
    sample._random = type("Last", (), {"random": lambda _: np.nextafter(1, 0)})()
    assert sample(row(0, 0, 0, -INF)) == 2


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_broken_logits_are_reported(bad: float) -> None:
    with pytest.raises(SessionError, match="overflowed or its weights are broken"):
        sampler()(row(0, bad))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 2}, {"frequency_penalty": 2.0}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(options: dict[str, Any], temperature: float) -> None:
    sample = sampler(temperature, seed=0, **options)
    assert set(np.flatnonzero(drawn(sample, 200, allowed=np.array([1, 0, 1, 0], bool)))) <= {0, 2}
    # What a mask does not reach is not allowed.
    assert sample(LOGITS, np.array([True])) == 0


def test_probabilities_among_allowed_tokens_keep_their_ratio() -> None:
    allowed = np.array([True, False, True, False])
    np.testing.assert_allclose(drawn(sampler(1.0, seed=0), allowed=allowed), [2 / 3, 0, 1 / 3, 0], atol=0.03)


def test_a_mask_that_leaves_nothing_is_reported() -> None:
    with pytest.raises(SessionError, match="no token is allowed here"):
        sampler()(LOGITS, np.zeros(4, bool))
    with pytest.raises(SessionError, match="the logits of all 2 allowed tokens are -inf"):
        sampler()(row(0, -INF, -INF), np.array([False, True, True]))


def test_a_bias_of_a_token_that_does_not_exist_is_refused() -> None:
    options = SamplingOptions(logit_bias={1: 1.0, 4: 1.0})
    options.check(5)
    with pytest.raises(SessionError, match="logit_bias names token 4, expected token ids from 0 to 3"):
        options.check(4)
    with pytest.raises(SessionError, match="logit_bias names token 4"):
        Sampler(options)(LOGITS)


def test_logprobs_are_those_of_the_model() -> None:
    answer = token_logprob(LOGITS, 2, 3)
    np.testing.assert_allclose(answer.logprob, math.log(0.05), rtol=1e-6)
    assert [token for token, _ in answer.top] == [1, 3, 0]
    np.testing.assert_allclose([math.exp(value) for _, value in answer.top], [0.5, 0.35, 0.1], rtol=1e-6)
    assert token_logprob(LOGITS, 0, 0).top == ()
    assert [token for token, _ in token_logprob(row(1, 5, 5), 0, 9).top] == [1, 2, 0]
    assert token_logprob(row(3e38, -INF), 1, 0).logprob == -INF


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1, expected 0"),
        ({"min_p": 2.0}, "min_p is 2.0, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected more than 0"),
        ({"presence_penalty": INF}, "presence_penalty is inf, expected -100 to 100"),
        ({"frequency_penalty": -101}, "frequency_penalty is -101"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias is 0.0 for token -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SessionError, match=message):
        SamplingOptions(**options)
