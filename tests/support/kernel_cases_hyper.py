"""Calls of the hyper-connection ops that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import KernelCase
from op_cases import OpCase


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    for tokens, width in ((1, 256), (3, 1032), (33, 128)):
        yield KernelCase(OpCase("V4HyperPost", {"S": tokens, "D": width}))
