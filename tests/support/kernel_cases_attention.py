"""Calls of the three attentions that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_run import Inputs, KernelCase
from op_cases import OpCase

WIDTH = {"Dh": 512, "F": 32}
SCALE = 512**-0.5


def _nothing_selected(inputs: Inputs) -> None:
    inputs["rows"][:] = -1


def _holes(inputs: Inputs) -> None:
    """Missing entries between those that are there."""
    inputs["rows"][..., ::3] = -1


def _few_long(inputs: Inputs) -> None:
    """Only the first tokens have entries, and all of them."""
    inputs["rows"][:, :3] = torch.arange(inputs["rows"].shape[2]).int()
    inputs["rows"][:, 3:] = -1


def _near_wrap() -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Yield (tokens, start, num) around the window's and the ring's ends, ragged, and with idle slots."""
    yield 1, (0, 5, 136), (1, 0, 1)
    yield 1, (127, 128), (1, 1)
    yield 9, (300,), (7,)
    yield 8, (120, 131), (8, 3)
    yield 30, (125, 0), (30, 0)


def cases() -> Iterator[KernelCase]:
    """Yield them."""
    window = {"window": 128, "scale": SCALE}
    for tokens, start, num in _near_wrap():
        sizes = {"S": tokens, "H": 4, "L": 136, **WIDTH}
        yield KernelCase(OpCase("V4WindowAttention", sizes, window, start, num))
    for heads in (3, 20, 40):
        sizes = {"S": 2, "H": heads, "L": 136, **WIDTH}
        yield KernelCase(OpCase("V4WindowAttention", sizes, window, (140, 2), (2, 1)))
    narrow = {"window": 8, "scale": SCALE}
    for tokens, start, num in ((9, (20,), (9,)), (40, (3, 7), (40, 25)), (140, (5,), (139,))):
        sizes = {"S": tokens, "H": 4, "L": 16, **WIDTH}
        yield KernelCase(OpCase("V4WindowAttention", sizes, narrow, start, num))
    # 32 heads a block: keys split, and not.
    sizes = {"S": 9, "H": 20, "L": 136, **WIDTH}
    yield KernelCase(OpCase("V4WindowAttention", sizes, window, (130, 2), (9, 5)))
    sizes = {"S": 67, "H": 20, "L": 16, **WIDTH}
    yield KernelCase(OpCase("V4WindowAttention", sizes, narrow, (3, 9), (67, 4)))
    yield from _compressed(window)
    yield from _selected(window)
    yield from _wide(narrow, window)


def _compressed(window: dict[str, float]) -> Iterator[KernelCase]:
    op, attributes = "V4CompressedAttention", {"window": 128, "ratio": 128, "scale": SCALE}
    for tokens, start, num in ((1, (126, 127, 1000), (1, 1, 1)), (9, (250,), (9,)), (5, (0, 510), (5, 0))):
        yield KernelCase(OpCase(op, {"S": tokens, "H": 4, "L": 136, "N": 8, **WIDTH}, attributes, start, num))
    # The last entry of the cache, and more closed blocks than it has.
    full = {"S": 2, "H": 20, "L": 136, "N": 3, **WIDTH}
    yield KernelCase(OpCase(op, full, attributes, (383, 900), (2, 2)))
    for heads, tokens in ((4, 1), (20, 3)):
        many = {"S": tokens, "H": heads, "L": 16, "N": 700, **WIDTH}
        yield KernelCase(OpCase(op, many, {"window": 8, "ratio": 4, "scale": SCALE}, (2999,), (tokens,)))


def _selected(window: dict[str, float]) -> Iterator[KernelCase]:
    op = "V4SelectedAttention"
    for tokens, start, num in ((1, (500, 3), (1, 1)), (9, (300,), (4,)), (30, (140, 0), (30, 0))):
        sizes = {"S": tokens, "H": 4, "L": 136, "N": 200, "K": 64, **WIDTH}
        yield KernelCase(OpCase(op, sizes, window, start, num))
    sizes = {"S": 12, "H": 20, "L": 160, "N": 80, "K": 64, **WIDTH}
    yield KernelCase(OpCase(op, sizes, window, (150,), (11,)))
    sizes = {"S": 2, "H": 40, "L": 136, "N": 10, "K": 24, **WIDTH}
    yield KernelCase(OpCase(op, sizes, window, (130,), (2,)))
    yield KernelCase(OpCase(op, sizes, window, (0,), (2,)), "nothing_selected", _nothing_selected)
    yield KernelCase(OpCase(op, sizes, window, (64,), (1,)), "holes", _holes)


def _wide(narrow: dict[str, float], window: dict[str, float]) -> Iterator[KernelCase]:
    """Yield calls of many tokens and heads: 64 heads a block, runs of tokens, the last of them shorter."""
    sizes = {"S": 67, "H": 36, "L": 16, **WIDTH}
    yield KernelCase(OpCase("V4WindowAttention", sizes, narrow, (3, 250, 0, 17), (67, 41, 0, 5)))
    # Decode of many slots: the same launch updates the ring. Windows that wrap it, idle slots, 3 x 64 heads.
    starts = (0, 5, 31, 126, 127, 128, 135, 300, *range(9))
    sizes = {"S": 2, "H": 130, "L": 136, **WIDTH}
    yield KernelCase(OpCase("V4WindowAttention", sizes, window, starts, (2, 1, 2, 2, 1, 2, 2, 2) + (0,) * 9))
    op = "V4CompressedAttention"
    sizes = {"S": 99, "H": 64, "L": 16, "N": 30, **WIDTH}
    yield KernelCase(OpCase(op, sizes, {"ratio": 4, **narrow}, (20,), (98,)))
    op = "V4SelectedAttention"
    sizes = {"S": 50, "H": 40, "L": 16, "N": 90, "K": 70, **WIDTH}
    yield KernelCase(OpCase(op, sizes, narrow, (0, 133), (50, 31)))
    yield KernelCase(OpCase(op, sizes, narrow, (9, 40), (50, 50)), "holes", _holes)
    yield KernelCase(OpCase(op, sizes, narrow, (9, 0), (50, 0)), "nothing_selected", _nothing_selected)
    # More tiles a run than are listed at a time.
    sizes = {"S": 134, "H": 40, "L": 16, "N": 310, "K": 300, **WIDTH}
    yield KernelCase(OpCase(op, sizes, narrow, (0,), (134,)), "few_long", _few_long)
