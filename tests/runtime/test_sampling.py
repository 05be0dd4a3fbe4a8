import math

import numpy as np
import pytest

from v4graph.errors import SessionError
from v4graph_runtime.sampling import Sampler

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.35], np.float32))


def drawn(sampler: Sampler, count: int = 4000) -> np.ndarray:
    return np.bincount([sampler(LOGITS) for _ in range(count)], minlength=4) / count


def test_temperature_zero_takes_the_best_and_ties_go_to_the_lowest_id() -> None:
    assert Sampler()(LOGITS) == 1
    assert Sampler()(np.array([0, 2, 2, 1], np.float32)) == 1


def test_samples_follow_the_probabilities() -> None:
    np.testing.assert_allclose(drawn(Sampler(1.0, seed=3)), [0.1, 0.5, 0.05, 0.35], atol=0.03)


def test_temperature_sharpens() -> None:
    powers = np.array([0.1, 0.5, 0.05, 0.35]) ** 2
    np.testing.assert_allclose(drawn(Sampler(0.5, seed=3)), powers / powers.sum(), atol=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {1}), (0.6, {1, 3}), (0.85, {1, 3}), (0.9, {0, 1, 3})])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: set[int]) -> None:
    shares = drawn(Sampler(1.0, top_p=top_p, seed=5))
    assert set(np.flatnonzero(shares)) == kept


def test_the_same_seed_gives_the_same_tokens() -> None:
    first, second, other = (Sampler(1.0, seed=seed) for seed in (1, 1, 2))
    tokens = [[sampler(LOGITS) for _ in range(50)] for sampler in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_extreme_values_do_not_overflow() -> None:
    assert Sampler(1e-300, seed=0)(np.array([-3e38, 3e38, 0], np.float32)) == 1
    assert Sampler(1.0, seed=0)(np.array([-math.inf, 0, -math.inf], np.float32)) == 1
    assert Sampler(1.0, 0.5, seed=0)(np.array([-math.inf, 0, -math.inf], np.float32)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_reported(bad: float) -> None:
    with pytest.raises(SessionError, match="overflowed or its weights are broken"):
        Sampler()(np.array([0, bad], np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(SessionError, match=message):
        Sampler(**options)  # type: ignore[arg-type]
