"""Quantise-dequantise and weight decoding, in torch operations that also exist in ONNX.

Scales are powers of two found by comparison with a table, so every runtime gets the same bits
however its log2 rounds. Source: spec section 2.0 (FakeFP8, FakeFP4), section 5 (FP4 packing).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
BLOCK = 128
FP4_BLOCK = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def powers_of_two() -> Tensor:
    """Value of every e8m0 byte: 2^(byte-127), float32 [256]; byte 255 is NaN by the format."""
    values = [2.0 ** (byte - 127) for byte in range(255)]
    return torch.tensor([*values, float("nan")], dtype=torch.float32)


def e4m3_values() -> Tensor:
    """Value of every e4m3 byte, float32 [256]; bytes 127 and 255 are NaN by the format."""
    values: list[float] = []
    for code in range(128):
        exponent, mantissa = code >> 3, code & 7
        values.append((8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9)
    values[127] = float("nan")
    return torch.tensor([*values, *(-value for value in values)], dtype=torch.float32)


def e2m1_pairs() -> Tensor:
    """The two e2m1 values of every byte, low nibble first, float32 [256, 2]."""
    signed = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
    return torch.tensor([[signed[byte & 15], signed[byte >> 4]] for byte in range(256)], dtype=torch.float32)


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Return the rows of `table` [256, W] at `index`: one ONNX Gather, where indexing gives a GatherND."""
    rows: Tensor = torch.nn.functional.embedding(index, table)
    return rows


def lookup_bytes(table: Tensor, codes: Tensor) -> Tensor:
    """Return the rows of `table` [256, W], in byte order, for bytes that travel as int8."""
    return lookup(torch.cat([table[128:], table[:128]]), codes.int() + 128)


def power_of_two_at_least(value: Tensor) -> Tensor:
    """Smallest power of two that is not below `value` (float32, at least 2^-126)."""
    table = powers_of_two()[:, None]
    byte = value.log2().ceil().long().clamp(-125, 126) + 127
    guess, below, above = (lookup(table, byte + step)[..., 0] for step in (0, -1, 1))
    return torch.where(below >= value, below, torch.where(guess >= value, guess, above))


def fake_fp8(x: Tensor, block: int) -> Tensor:
    """Round float32 [..., n] to e4m3 with one power-of-two scale per `block` values, and back."""
    size = x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], size // block, block)
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = power_of_two_at_least(amax * (1.0 / E4M3_MAX))
    codes = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).reshape(x.shape)


def fake_fp4(x: Tensor) -> Tensor:
    """Round float32 [..., n] to e2m1 with one power-of-two scale per 32 values, and back."""
    size = x.shape[-1]
    blocks = x.reshape(*x.shape[:-1], size // FP4_BLOCK, FP4_BLOCK)
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=E2M1_MAX * 2.0**-126)
    scale = power_of_two_at_least(amax * (1.0 / E2M1_MAX))
    y = (blocks / scale).clamp(-E2M1_MAX, E2M1_MAX)
    size_of_y = y.abs()
    # Spacing of the e2m1 grid below 2, below 4 and up to 6; ties go to the even code on each part.
    step = torch.where(size_of_y < 2.0, 0.5, torch.where(size_of_y < 4.0, 1.0, 2.0))
    return ((y / step).round() * step * scale).reshape(x.shape)


def hadamard_128(x: Tensor) -> Tensor:
    """Multiply the last 128 channels by the Walsh-Hadamard matrix and 128^-0.5, in float32.

    Seven butterfly stages of plain additions: the same bits in every runtime.
    """
    lead = x.shape[:-1]
    half = 64
    while half:
        pairs = x.reshape(*lead, 64 // half, 2, half)
        left, right = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([left + right, left - right], -2).reshape(*lead, 128)
        half //= 2
    y: Tensor = x * 128**-0.5
    return y


def decode_scale(scale: Tensor) -> Tensor:
    """Return float32 scales from e8m0 bytes (int8) or from float32 as stored."""
    if scale.dtype == torch.float32:
        return scale
    return lookup_bytes(powers_of_two()[:, None], scale)[..., 0]


def decode_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, K] from e4m3 bytes [O, K] and one scale per 128x128 block; K a multiple of 128."""
    rows, columns = weight.shape
    values = lookup_bytes(e4m3_values()[:, None], weight).reshape(rows, columns // BLOCK, BLOCK)
    by_row = decode_scale(scale).index_select(0, torch.arange(rows) // BLOCK)
    return (values * by_row[..., None]).reshape(rows, columns)


def decode_fp4(weight: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [O, K] from packed e2m1 bytes [O, K/2] and one e8m0 byte per 32 values."""
    rows, packed = weight.shape
    values = lookup_bytes(e2m1_pairs(), weight).reshape(rows, packed * 2 // FP4_BLOCK, FP4_BLOCK)
    return (values * decode_scale(scale)[..., None]).reshape(rows, packed * 2)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return float32 x W^T with x float32 rounded to FP8 1x128 and W in FP8 128x128."""
    y: Tensor = torch.nn.functional.linear(fake_fp8(x, BLOCK), decode_fp8(weight, scale))
    return y


def fp4_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return float32 x W^T with x float32 rounded to FP8 1x128 and W in FP4 1x32."""
    y: Tensor = torch.nn.functional.linear(fake_fp8(x, BLOCK), decode_fp4(weight, scale))
    return y
