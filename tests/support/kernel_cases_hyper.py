"""Calls of the hyper-connection ops that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import Inputs, KernelCase
from op_cases import OpCase

HYPER = {"eps": 1e-6, "hc_eps": 1e-6}


def _outlier(inputs: Inputs) -> None:
    """One stream a hundred times the others, as trained models have it."""
    inputs["x"][:, :, 1] *= 100


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    for tokens, width in ((1, 256), (1, 4104), (3, 1032), (33, 128), (66, 64)):
        one = {"S": tokens, "D": width}
        yield KernelCase(OpCase("V4HyperPre", one, {"iters": 20, **HYPER}))
        yield KernelCase(OpCase("V4HyperHead", one, HYPER))
        yield KernelCase(OpCase("V4HyperPost", one))
    yield KernelCase(OpCase("V4HyperPre", {"S": 4, "D": 256}, {"iters": 1, **HYPER}), "outlier", _outlier)
