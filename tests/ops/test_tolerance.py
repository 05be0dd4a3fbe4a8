"""The comparison that every implementation of an op must pass can fail."""

from __future__ import annotations

import numpy as np
import pytest

from v4graph.ops import OPS_BY_NAME
from v4graph.ops.tolerance import mismatch

WANT = np.linspace(-4, 4, 10_000, dtype=np.float32)
QUANTISED = {"quantise": 1}


def moved(elements: int, by: float) -> np.ndarray:
    got = WANT.copy()
    got[:elements] += by
    return got


def test_equal_values_pass() -> None:
    assert not mismatch(OPS_BY_NAME["V4AttentionPrep"], WANT, WANT, QUANTISED)


@pytest.mark.parametrize(
    ("op", "attributes", "elements", "by"),
    [
        ("V4HyperPost", {}, 1, 1e-2),  # nothing is quantised, so not one element may leave
        ("V4AttentionPrep", {"quantise": 0}, 1, 1e-2),
        ("V4Compress", {"quantise": "none"}, 1, 1e-2),
        ("V4AttentionPrep", QUANTISED, 11, 1e-2),  # more than the share that may flip
        ("V4AttentionPrep", QUANTISED, 1, 1.0),  # more than a step
        ("V4AttentionPrep", QUANTISED, 1, np.nan),
    ],
)
def test_what_is_outside_is_reported(op: str, attributes: dict, elements: int, by: float) -> None:
    assert op in mismatch(OPS_BY_NAME[op], moved(elements, by), WANT, attributes)


def test_a_flip_within_the_share_passes() -> None:
    assert not mismatch(OPS_BY_NAME["V4AttentionPrep"], moved(10, 1e-2), WANT, QUANTISED)


def test_indices_must_be_equal() -> None:
    rows = np.arange(8, dtype=np.int32)
    assert "1 of 8" in mismatch(OPS_BY_NAME["V4IndexTopK"], rows, np.where(rows == 3, -1, rows), {})
