"""Calls of V4IndexTopK that its kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import Inputs, KernelCase
from op_cases import OpCase


def _equal_keys(inputs: Inputs) -> None:
    """Runs of equal keys, longer than the selection: scores tie exactly."""
    keys = inputs["keys"]
    keys[:, 3:] = keys[:, 3:4]
    keys[:, 50:60] = keys[:, :1]


def _nothing_scores(inputs: Inputs) -> None:
    """All scores are zero, of either sign: the first entries win."""
    inputs["weights"][..., ::2] = 0
    inputs["weights"][..., 1::2] = -0.0


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    for quantise in (0, 1):
        attributes = {"topk": 24, "ratio": 4, "quantise": quantise, "scale": 128**-0.5 * 0.25}
        for tokens, start, num, entries in (
            (1, (0, 3, 400), (1, 1, 1), 100),
            (5, (0, 90), (5, 5), 100),
            (33, (100,), (33,), 64),
            (2, (39,), (2,), 10),
        ):
            sizes = {"S": tokens, "Q": 16 * 128, "Hi": 16, "C": 128, "F": 32, "N": entries}
            yield KernelCase(OpCase("V4IndexTopK", sizes, attributes, start, num))
    attributes = {"topk": 64, "ratio": 4, "quantise": 1, "scale": 128**-0.5 * 0.125}
    sizes = {"S": 9, "Q": 64 * 128, "Hi": 64, "C": 128, "F": 32, "N": 300}
    yield KernelCase(OpCase("V4IndexTopK", sizes, attributes, (1190,), (9,)))
    # More entries than the block that selects has threads, and a selection that is no power of two.
    sizes = {"S": 1, "Q": 16 * 128, "Hi": 16, "C": 128, "F": 32, "N": 1300}
    yield KernelCase(OpCase("V4IndexTopK", sizes, {**attributes, "topk": 600}, (5201,), (1,)))
    sizes = {"S": 2, "Q": 16 * 128, "Hi": 16, "C": 128, "F": 32, "N": 600}
    for label, change in (("equal_keys", _equal_keys), ("zeros", _nothing_scores)):
        yield KernelCase(OpCase("V4IndexTopK", sizes, attributes, (2390,), (2,)), label, change)
    # More entries than are ranked: histogram and list, a row that needs neither, rows of no token.
    for tokens, starts, entries in ((1, (9300, 70), 2300), (9, (9200,), 2303)):
        sizes = {"S": tokens, "Q": 16 * 128, "Hi": 16, "C": 128, "F": 32, "N": entries}
        yield KernelCase(OpCase("V4IndexTopK", sizes, attributes, starts, (tokens,) * len(starts)))
    # A list that is too long to rank, and one that does not hold all candidates.
    for entries in (2300, 16500):
        sizes = {"S": 1, "Q": 4 * 128, "Hi": 4, "C": 128, "F": 32, "N": entries}
        case = OpCase("V4IndexTopK", sizes, {**attributes, "topk": 300}, (4 * entries,), (1,))
        yield KernelCase(case, "zeros", _nothing_scores)
        yield KernelCase(case)
