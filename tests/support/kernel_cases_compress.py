"""Calls of V4Compress that its kernel is tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import KernelCase
from op_cases import OpCase


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    for quantise, width in (("none", 192), ("kv", 512), ("index", 128)):
        attributes = {"overlap": 1, "quantise": quantise, "eps": 1e-6}
        sizes = {"C": width, "CC": 2 * width, "F": 32, "R": 4, "L": 16, "N": 40}
        for tokens, start, num in (
            (1, (0, 3, 6), (1, 1, 0)),
            (3, (1, 6), (3, 2)),
            (9, (7, 0), (9, 5)),
            (20, (13,), (20,)),
            (33, (2, 100), (31, 0)),
        ):
            yield KernelCase(OpCase("V4Compress", {"S": tokens, **sizes}, attributes, start, num))
        # The cache's last entry, and one that it has no room for.
        yield KernelCase(OpCase("V4Compress", {"S": 8, **sizes}, attributes, (153,), (8,)))
    for quantise in ("none", "kv"):
        attributes = {"overlap": 0, "quantise": quantise, "eps": 1e-6}
        sizes = {"C": 512, "CC": 512, "F": 32, "R": 128, "L": 136, "N": 4}
        for tokens, start, num in ((1, (127, 126), (1, 1)), (9, (250,), (9,)), (130, (120,), (130,))):
            yield KernelCase(OpCase("V4Compress", {"S": tokens, **sizes}, attributes, start, num))
    yield KernelCase(OpCase("V4Compress", {"S": 260, **sizes}, attributes, (5,), (258,)))
