"""FP8 (e4m3), FP4 (e2m1) and power-of-two (e8m0) codecs and quantisers, in numpy on ml_dtypes.

Rounding is to nearest even and bit-exact to the official kernels: the scale of a block is the power
of two at or above amax/448 (FP8) or amax/6 (FP4), read from the bits of the float32 product.
Large matrices are worked through in bands of rows, so only the result is ever held whole.
Source: DeepSeek-V4 inference/kernel.py (act_quant, fp4_act_quant, fast_round_scale).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F32Array = npt.NDArray[np.float32]
U8Array = npt.NDArray[np.uint8]

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)

E4M3_MAX = 448.0
E2M1_MAX = 6.0
FP8_BLOCK = 128
FP4_BLOCK = 32
# The smallest amax of a block: of FP8 activations, of FP4, and of FP8 weights.
ACTIVATION_FLOOR = 1e-4
FP4_FLOOR = 6 * 2.0**-126
WEIGHT_FLOOR = 448 * 2.0**-126
E2M1_VALUES: F32Array = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32
)
# Value pair of every packed byte, [256, 2]: the low nibble holds the even element.
E2M1_PAIRS: F32Array = np.stack([np.tile(E2M1_VALUES, 16), np.repeat(E2M1_VALUES, 16)], axis=1)
E4M3_VALUES: F32Array = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
E8M0_VALUES: F32Array = np.arange(256, dtype=np.uint8).view(E8M0).astype(np.float32)

_BAND_ELEMENTS = 1 << 22


def encode_e4m3(values: Array) -> Array:
    """Clamp to +-448 and round to e4m3; NaN stays NaN."""
    return np.clip(np.asarray(values, np.float32), -E4M3_MAX, E4M3_MAX).astype(E4M3)


def decode_e4m3(codes: Array) -> F32Array:
    """Return the values of e4m3 codes (dtype e4m3, int8 or uint8)."""
    return E4M3_VALUES[codes.view(np.uint8)]


def encode_e2m1(values: Array) -> U8Array:
    """Clamp to +-6 and round to e2m1 codes 0..15, one per byte: sign << 3 | index."""
    clipped = np.clip(np.asarray(values, np.float32), -E2M1_MAX, E2M1_MAX)
    return clipped.astype(_E2M1).view(np.uint8) & np.uint8(15)


def decode_e2m1(codes: U8Array) -> F32Array:
    """Return the values of unpacked e2m1 codes."""
    return E2M1_VALUES[codes]


def pack_e2m1(codes: U8Array) -> npt.NDArray[np.int8]:
    """Pack codes [..., K] into bytes [..., K/2], even elements in the low nibble."""
    return (codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)).view(np.int8)


def unpack_e2m1(packed: Array) -> U8Array:
    """Return the codes [..., K] of packed bytes [..., K/2]."""
    data = packed.view(np.uint8)
    return np.stack([data & np.uint8(15), data >> np.uint8(4)], axis=-1).reshape(*data.shape[:-1], -1)


def decode_e8m0(scales: Array) -> F32Array:
    """Return the values 2^(byte-127) of e8m0 scales (dtype e8m0, int8 or uint8); 255 is NaN."""
    return E8M0_VALUES[scales.view(np.uint8)]


def ceil_scale(amax: Array, limit: float) -> Array:
    """Return the e8m0 scale of blocks whose largest magnitude is `amax`: 2^ceil(log2(amax/limit)).

    Bit-exact to the official kernels: the exponent of the float32 product amax * (1/limit), plus
    one if its mantissa is not zero. `amax` must be large enough for the product to be normal.
    """
    product = np.asarray(amax, np.float32) * np.float32(1 / limit)
    bits = product.view(np.uint32)
    exponent: npt.NDArray[np.uint32] = (bits >> np.uint32(23)) & np.uint32(255)
    exponent += (bits & np.uint32(0x7FFFFF)) != 0
    return exponent.astype(np.uint8).view(E8M0)


def quantise_activations(x: Array, block: int = FP8_BLOCK) -> tuple[Array, Array]:
    """Quantise [..., K] to e4m3 with one e8m0 scale per `block` values of a row.

    Returns:
        Codes e4m3 [..., K] and scales e8m0 [..., K/block].
    """
    blocks = _blocks(x, block)
    scale = ceil_scale(np.maximum(np.abs(blocks).max(axis=-1), np.float32(ACTIVATION_FLOOR)), E4M3_MAX)
    codes = encode_e4m3(blocks / decode_e8m0(scale)[..., None])
    return codes.reshape(x.shape), scale


def fake_fp8(x: Array, block: int = FP8_BLOCK) -> F32Array:
    """Round [..., K] to FP8 and back, one power-of-two scale per `block` values."""
    codes, scale = quantise_activations(x, block)
    return (decode_e4m3(codes).reshape(*scale.shape, block) * decode_e8m0(scale)[..., None]).reshape(x.shape)


def fake_fp4(x: Array, block: int = FP4_BLOCK) -> F32Array:
    """Round [..., K] to FP4 and back, one power-of-two scale per `block` values."""
    blocks = _blocks(x, block)
    scale = decode_e8m0(_fp4_scale(blocks))[..., None]
    return (decode_e2m1(encode_e2m1(blocks / scale)) * scale).reshape(x.shape)


def quantise_fp8(weight: Array) -> tuple[Array, Array]:
    """Quantise a matrix [out, in] to e4m3 with one e8m0 scale per 128x128 block.

    Blocks at the right and bottom edges may be smaller.

    Returns:
        Codes e4m3 [out, in] and scales e8m0 [ceil(out/128), ceil(in/128)].
    """
    rows, columns = weight.shape
    starts = np.arange(0, columns, FP8_BLOCK)
    codes = np.empty((rows, columns), E4M3)
    scales = np.empty((-(-rows // FP8_BLOCK), len(starts)), E8M0)
    for i, top in enumerate(range(0, rows, FP8_BLOCK)):
        band = np.asarray(weight[top : top + FP8_BLOCK], np.float32)
        amax = np.maximum.reduceat(np.abs(band).max(axis=0), starts)
        scales[i] = ceil_scale(np.maximum(amax, np.float32(WEIGHT_FLOOR)), E4M3_MAX)
        codes[top : top + FP8_BLOCK] = encode_e4m3(band / _spread(decode_e8m0(scales[i]), columns))
    return codes, scales


def dequantise_fp8(codes: Array, scale: Array) -> F32Array:
    """Return float32 [out, in] of an FP8 matrix and its 128x128 scales (e8m0, bytes, or float32)."""
    factors = scale if scale.dtype == np.float32 else decode_e8m0(scale)
    out = np.empty(codes.shape, np.float32)
    for i, top in enumerate(range(0, codes.shape[0], FP8_BLOCK)):
        band = decode_e4m3(codes[top : top + FP8_BLOCK])
        np.multiply(band, _spread(factors[i], codes.shape[1]), out=out[top : top + FP8_BLOCK])
    return out


def quantise_fp4(weight: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Quantise a matrix [out, in] to packed e2m1 with one e8m0 scale per row and 32 columns.

    Returns:
        Packed codes int8 [out, in/2] and scales e8m0 [out, in/32].
    """
    rows, columns = weight.shape
    packed = np.empty((rows, columns // 2), np.int8)
    scales = np.empty((rows, columns // FP4_BLOCK), E8M0)
    for band in _bands(rows, columns):
        blocks = _blocks(weight[band], FP4_BLOCK)
        scales[band] = _fp4_scale(blocks)
        codes = encode_e2m1(blocks / decode_e8m0(scales[band])[..., None])
        packed[band] = pack_e2m1(codes.reshape(-1, columns))
    return packed, scales


def dequantise_fp4(packed: Array, scale: Array) -> F32Array:
    """Return float32 [out, in] of packed FP4 [out, in/2] and its scales [out, in/32]."""
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    out = np.empty((rows, columns), np.float32)
    for band in _bands(rows, columns):
        values = E2M1_PAIRS[packed[band].view(np.uint8)].reshape(-1, columns // FP4_BLOCK, FP4_BLOCK)
        out[band] = (values * decode_e8m0(scale[band])[..., None]).reshape(-1, columns)
    return out


def hadamard_128(x: Array) -> F32Array:
    """Multiply blocks of 128 of the last axis by the Walsh-Hadamard matrix and 128^-0.5, in float32."""
    y = np.array(x, np.float32).reshape(-1, 128)
    step = 1
    while step < 128:
        pairs = y.reshape(-1, 2, step)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        step *= 2
    return (y * np.float32(128**-0.5)).reshape(x.shape)


def _blocks(x: Array, block: int) -> F32Array:
    return np.asarray(x, np.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _fp4_scale(blocks: F32Array) -> Array:
    return ceil_scale(np.maximum(np.abs(blocks).max(axis=-1), np.float32(FP4_FLOOR)), E2M1_MAX)


def _spread(factors: F32Array, columns: int) -> F32Array:
    """Repeat one factor per block over the columns that it covers."""
    return np.repeat(factors, FP8_BLOCK)[:columns]


def _bands(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BAND_ELEMENTS // max(columns, 1))
    for top in range(0, rows, step):
        yield slice(top, top + step)
