"""Calls of V4RmsNorm and V4AttentionPrep that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import KernelCase
from op_cases import OpCase


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    eps = {"eps": 1e-6}
    for tokens, width in ((1, 1024), (5, 136), (33, 128)):
        yield KernelCase(OpCase("V4RmsNorm", {"S": tokens, "D": width}, eps))
    for quantise in (0, 1):
        attributes = {"quantise": quantise, **eps}
        for tokens, heads, width, start in (
            (1, 4, 512, (0, 1_000_000)),
            (5, 3, 192, (127,)),
            (9, 1, 512, (3, 70_000)),
        ):
            sizes = {"S": tokens, "Q": heads * width, "Dh": width, "F": 32}
            yield KernelCase(OpCase("V4AttentionPrep", sizes, attributes, start, (tokens,) * len(start)))
