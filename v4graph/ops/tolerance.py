"""Compare an implementation's output with the reference's, within the op's own tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.ops.spec import OpSpec

# One step of e4m3 is at most 2^-3 of the value; of a block's largest value, for any value in it.
STEP = 2.0**-3


def mismatch(
    spec: OpSpec,
    got: npt.NDArray[np.generic],
    want: npt.NDArray[np.generic],
    attributes: Mapping[str, Any],
    dtype: str = "float32",
) -> str:
    """Return what is wrong with `got`, or an empty string.

    Elements outside (rtol, atol) are counted; up to `spec.flips` of them may differ by at most one
    quantiser step of the largest expected value, if the call's `attributes` quantise at all.
    """
    flips = 0.0 if attributes.get("quantise") in (0, "none") else spec.flips
    if got.shape != want.shape:
        return f"{spec.name}: shape {got.shape}, expected {want.shape}"
    rtol, atol = spec.tolerance[dtype]
    if not np.issubdtype(want.dtype, np.floating):
        wrong = int((got != want).sum())
        return f"{spec.name}: {wrong} of {want.size} elements differ" if wrong else ""
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    outside = ~(difference <= atol + rtol * np.abs(want.astype(np.float64)))
    if not outside.any():
        return ""
    worst = f"largest difference {difference.max():.3g}, tolerance rtol {rtol} atol {atol}"
    if outside.mean() > flips:
        return f"{spec.name}: {int(outside.sum())} of {want.size} elements differ; {worst}"
    if not difference.max() <= STEP * np.abs(want).max():
        return f"{spec.name}: an element differs by more than a quantiser step; {worst}"
    return ""
