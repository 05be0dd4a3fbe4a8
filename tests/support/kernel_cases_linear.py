"""Calls of the linear projections that their kernels are tested on."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_run import KernelCase
from op_cases import OpCase


def _call(tokens: int) -> dict[str, object]:
    """One slot, which is all that these ops see of a batch."""
    return {"start": (0,), "num": (tokens,)}


def cases() -> Iterator[KernelCase]:
    """Yield them: widths and rows that no tile divides, and token counts around every path's limits."""
    for tokens in (1, 8, 9, 33, 70):
        one = {"S": tokens}
        for op in ("V4Linear", "V4LinearF32"):
            yield KernelCase(OpCase(op, {**one, "K": 256, "O": 130}, **_call(tokens)))
        for scale in ("int8", "float32"):
            sizes = {**one, "K": 384, "O": 200, "OB": 2, "KB": 3}
            yield KernelCase(OpCase("V4Fp8Linear", sizes, scale=scale, **_call(tokens)))
            grouped = {**one, "H": 2, "Dh": 256, "O": 160, "K": 256, "OB": 2, "KB": 2}
            yield KernelCase(
                OpCase("V4Fp8GroupedOutput", grouped, {"groups": 2}, scale=scale, **_call(tokens))
            )
        sizes = {**one, "H": 4, "Dh": 128, "O": 96, "K": 256}
        yield KernelCase(OpCase("V4GroupedOutput", sizes, {"groups": 2}, **_call(tokens)))
    # One to eight warps share a row's columns.
    for width in (128, 512, 1152):
        sizes = {"S": 3, "K": width, "O": 200, "OB": 2, "KB": width // 128}
        yield KernelCase(OpCase("V4Fp8Linear", sizes, **_call(3)))
        grouped = {"S": 3, "H": 2, "Dh": width, "O": 160, "K": width, "OB": 2, "KB": width // 128}
        yield KernelCase(OpCase("V4Fp8GroupedOutput", grouped, {"groups": 2}, **_call(3)))
    # Activations that do not fit the shared memory of the block that multiplies.
    yield KernelCase(OpCase("V4Fp8Linear", {"S": 7, "K": 8192, "O": 16, "OB": 1, "KB": 64}, **_call(7)))
    wide = {"S": 8, "H": 16, "Dh": 512, "O": 32, "K": 4096, "OB": 1, "KB": 32}
    yield KernelCase(OpCase("V4Fp8GroupedOutput", wide, {"groups": 2}, **_call(8)))
    yield KernelCase(OpCase("V4Fp8Linear", {"S": 2, "K": 128, "O": 1, "OB": 1, "KB": 1}, start=(0, 0)))
    yield KernelCase(OpCase("V4LinearF32", {"S": 65, "K": 1152, "O": 300}, **_call(65)))
