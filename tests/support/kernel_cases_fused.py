"""Calls of the fused ops that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import Inputs, KernelCase
from op_cases import OpCase


def _outlier(inputs: Inputs) -> None:
    """One stream a hundred times the others, as trained models have it."""
    inputs["x"][:, :, 1] *= 100


def cases() -> Iterator[KernelCase]:
    """Yield them: one launch and several, widths and rows that no tile divides."""
    hyper = {"iters": 20, "eps": 1e-6, "hc_eps": 1e-6}
    for tokens, width in ((1, 256), (1, 4104), (3, 1032), (33, 128), (66, 64)):
        yield KernelCase(OpCase("V4HyperPostPre", {"S": tokens, "D": width}, hyper))
    yield KernelCase(OpCase("V4HyperPostPre", {"S": 5, "D": 256}, hyper), "outlier", _outlier)
    yield from _projections()
    yield from _prep()


def _projections() -> Iterator[KernelCase]:
    rows = {"Oq": 200, "OqB": 2, "Okv": 96, "OkvB": 1, "Oc": 72, "Oi": 40, "OiB": 1, "Ow": 20}
    for tokens, scale in ((1, "int8"), (8, "float32"), (9, "int8"), (33, "int8")):
        call = {"start": (0,), "num": (tokens,), "scale": scale}
        for op in ("V4WindowProjections", "V4HcaProjections", "V4CsaProjections"):
            yield KernelCase(OpCase(op, {"S": tokens, "K": 384, "KB": 3, **rows}, **call))
        for op in ("V4QueryProjection", "V4CsaQueryProjections"):
            yield KernelCase(OpCase(op, {"S": tokens, "K": 384, "KB": 3, **rows}, {"eps": 1e-6}, **call))
    for width in (128, 512, 1152):
        for op in ("V4QueryProjection", "V4CsaQueryProjections"):
            sizes = {"S": 2, "K": width, "KB": width // 128, **rows}
            yield KernelCase(OpCase(op, sizes, {"eps": 1e-6}, start=(0,), num=(2,)))
    # Rows that do not fit the shared memory of the block that multiplies.
    wide = {"S": 7, "K": 8192, "KB": 64, **rows, "Oq": 16, "OqB": 1, "Okv": 16}
    for op in ("V4WindowProjections", "V4HcaProjections", "V4CsaProjections"):
        yield KernelCase(OpCase(op, wide, start=(0,), num=(7,)))
    for op in ("V4QueryProjection", "V4CsaQueryProjections"):
        yield KernelCase(OpCase(op, wide, {"eps": 1e-6}, start=(0,), num=(7,)))


def _prep() -> Iterator[KernelCase]:
    queries = {"Q": 3 * 192, "Dh": 192, "F": 32}
    main = {"C": 192, "CC": 384, "R": 4, "L": 16, "N": 40}
    for tokens, start, num in (
        (1, (0, 3, 6), (1, 1, 0)),
        (3, (1, 6), (3, 2)),
        (9, (7, 0), (9, 5)),
        (20, (13,), (20,)),
    ):
        sizes = {"S": tokens, **queries, **main, "I": 128, "IC": 256}
        yield KernelCase(OpCase("V4CsaPrep", sizes, {"eps": 1e-6}, start, num))
    wide = {"Q": 2 * 512, "Dh": 512, "F": 32, "C": 512, "CC": 512, "R": 128, "L": 136, "N": 4}
    for tokens, start, num in ((1, (127, 126), (1, 1)), (9, (250,), (9,)), (130, (120,), (130,))):
        yield KernelCase(OpCase("V4HcaPrep", {"S": tokens, **wide}, {"eps": 1e-6}, start, num))
