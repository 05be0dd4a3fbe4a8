"""Codecs agree with their formats on every code; quantisers agree with a slow exact definition."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4graph import numerics
from v4graph.numerics import BF16, E2M1_VALUES, E4M3, E4M3_VALUES, E8M0

BYTES = np.arange(256, dtype=np.uint8)
FINITE_E4M3 = E4M3_VALUES[~np.isnan(E4M3_VALUES)]


def e4m3_by_definition(code: int) -> float:
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))


def nearest_even(value: float, grid: list[float]) -> float:
    """Round to the nearest value of a sorted, non-negative grid; ties go to the even code."""
    value_, sign = abs(value), math.copysign(1, value)
    best = min(range(len(grid)), key=lambda code: (abs(Fraction(value_) - Fraction(grid[code])), code % 2))
    return math.copysign(grid[best], sign)


def test_every_e4m3_code_decodes_to_its_definition() -> None:
    expected = np.array([e4m3_by_definition(code) for code in range(256)], np.float32)
    for codes in (BYTES, BYTES.view(np.int8), BYTES.view(E4M3)):
        np.testing.assert_array_equal(numerics.decode_e4m3(codes), expected)
    np.testing.assert_array_equal(BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32), expected)


def test_every_e4m3_value_encodes_to_itself() -> None:
    codes = BYTES[~np.isnan(E4M3_VALUES)]
    np.testing.assert_array_equal(numerics.encode_e4m3(E4M3_VALUES[codes]).view(np.uint8), codes)
    assert np.isnan(numerics.encode_e4m3(np.array([np.nan], np.float32)).astype(np.float32)).all()


def test_e4m3_rounds_midpoints_to_even_and_clamps() -> None:
    grid = sorted(set(np.abs(FINITE_E4M3).tolist()))
    middle = [(a + b) / 2 for a, b in pairwise(grid)]
    around = [np.nextafter(np.float32(m), np.float32(to)) for m in middle for to in (-np.inf, np.inf)]
    values = np.array([*middle, *around, 448.1, 464, 500, 1e30, np.inf], np.float32)
    values = np.concatenate([values, -values])
    expected = [nearest_even(min(max(float(v), -448), 448), grid) for v in values]
    np.testing.assert_array_equal(numerics.encode_e4m3(values).astype(np.float32), expected)


def test_every_e2m1_code_decodes_to_its_definition() -> None:
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(
        numerics.decode_e2m1(codes), codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )
    np.testing.assert_array_equal(numerics.encode_e2m1(E2M1_VALUES), codes)
    assert E2M1_VALUES[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e2m1_rounds_midpoints_to_even_and_clamps() -> None:
    grid = E2M1_VALUES[:8].tolist()
    middle = [(a + b) / 2 for a, b in pairwise(grid)]
    around = [np.nextafter(np.float32(m), np.float32(to)) for m in middle for to in (-np.inf, np.inf)]
    values = np.array([*middle, *around, 7, 1e30, np.inf], np.float32)
    values = np.concatenate([values, -values])
    expected = [nearest_even(min(max(float(v), -6), 6), grid) for v in values]
    np.testing.assert_array_equal(numerics.decode_e2m1(numerics.encode_e2m1(values)), expected)


def test_fp4_packs_the_even_element_low() -> None:
    packed = numerics.pack_e2m1(np.array([[1, 2, 15, 8]], np.uint8))
    assert packed.dtype == np.int8
    assert packed.view(np.uint8).tolist() == [[0x21, 0x8F]]


def test_fp4_packing_round_trips_for_every_byte() -> None:
    codes = numerics.unpack_e2m1(BYTES[None])
    assert codes.shape == (1, 512)
    np.testing.assert_array_equal(numerics.pack_e2m1(codes).view(np.uint8), BYTES[None])
    np.testing.assert_array_equal(numerics.E2M1_PAIRS.reshape(-1), numerics.decode_e2m1(codes)[0])


def test_every_e8m0_byte_is_its_power_of_two() -> None:
    expected = np.array([*(math.ldexp(1, byte - 127) for byte in range(255)), math.nan], np.float32)
    for scales in (BYTES, BYTES.view(np.int8), BYTES.view(E8M0)):
        np.testing.assert_array_equal(numerics.decode_e8m0(scales), expected)
    np.testing.assert_array_equal(BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), expected)


@pytest.mark.parametrize("limit", [448.0, 6.0])
def test_ceil_scale_follows_the_bits_of_the_product_at_power_of_two_boundaries(limit: float) -> None:
    exact = np.ldexp(np.float32(limit), np.arange(-118, 110)).astype(np.float32)
    amax = np.concatenate(
        [exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf))]
    )
    got = numerics.ceil_scale(amax, limit).view(np.uint8)
    for value, byte in zip(amax, got, strict=True):
        mantissa, exponent = math.frexp(float(value * np.float32(1 / limit)))
        assert byte == exponent - 1 + (mantissa != 0.5) + 127


@pytest.mark.parametrize("limit", [448.0, 6.0])
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_ceil_scale_never_lets_a_code_overflow_by_more_than_rounding(limit: float, amax: float) -> None:
    scale = float(numerics.decode_e8m0(numerics.ceil_scale(np.array([amax], np.float32), limit))[0])
    assert amax / scale <= limit * (1 + 2**-22)
    assert amax / scale > limit / 2 * (1 - 2**-22)


def test_scale_floors_give_normal_numbers() -> None:
    zeros = np.zeros((128, 128), np.float32)
    assert numerics.quantise_activations(zeros)[1].astype(np.float32).max() == 2.0**-22
    assert numerics.quantise_fp8(zeros)[1].astype(np.float32).tolist() == [[2.0**-126]]
    assert numerics.quantise_fp4(zeros)[1].astype(np.float32).max() == 2.0**-126


def fake_by_definition(
    x: np.ndarray, block: int, limit: float, floor: float, grid: list[float]
) -> np.ndarray:
    """One value at a time, scale by exact arithmetic on the float32 product."""
    out = np.empty_like(x)
    for row, line in enumerate(x):
        for start in range(0, len(line), block):
            part = line[start : start + block]
            product = np.float32(max(np.abs(part).max(), np.float32(floor))) * np.float32(1 / limit)
            mantissa, exponent = math.frexp(float(product))
            scale = math.ldexp(1, exponent - (mantissa == 0.5))
            rounded = [nearest_even(min(max(float(v) / scale, -limit), limit), grid) * scale for v in part]
            out[row, start : start + block] = rounded
    return out


def ragged_values(rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((rows, columns)).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 20, (rows, 1))).astype(np.float32)
    x[-1, :40] = 0
    return x


@pytest.mark.parametrize("block", [64, 128])
def test_fake_fp8_equals_its_definition(block: int) -> None:
    x = ragged_values(6, 256)
    grid = sorted(set(np.abs(FINITE_E4M3).tolist()))
    expected = fake_by_definition(x, block, 448, 1e-4, grid)
    np.testing.assert_array_equal(numerics.fake_fp8(x, block), expected)


def test_fake_fp4_equals_its_definition() -> None:
    x = ragged_values(8, 128)
    expected = fake_by_definition(x, 32, 6, 6 * 2.0**-126, E2M1_VALUES[:8].tolist())
    np.testing.assert_array_equal(numerics.fake_fp4(x), expected)


def test_quantised_activations_are_codes_and_scales_of_the_fake_ones() -> None:
    x = ragged_values(5, 256).reshape(5, 1, 256)
    codes, scale = numerics.quantise_activations(x)
    assert codes.shape == x.shape and scale.shape == (5, 1, 2)
    values = codes.astype(np.float32).reshape(5, 1, 2, 128) * scale.astype(np.float32)[..., None]
    np.testing.assert_array_equal(values.reshape(x.shape), numerics.fake_fp8(x))


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 1), (129, 384)])
def test_fp8_weights_round_per_block_with_ragged_edges(shape: tuple[int, int]) -> None:
    weight = ragged_values(300, 384)[: shape[0], : shape[1]]
    codes, scale = numerics.quantise_fp8(weight)
    assert (codes.dtype, scale.dtype) == (E4M3, E8M0)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    decoded = numerics.dequantise_fp8(codes, scale)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = np.s_[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
            factor = np.float32(scale[i, j])
            assert 224 < np.abs(weight[block]).max() / factor <= 448
            np.testing.assert_array_equal(
                decoded[block], (weight[block] / factor).astype(E4M3).astype(np.float32) * factor
            )


def test_float_scales_and_byte_views_dequantise_alike() -> None:
    codes, scale = numerics.quantise_fp8(ragged_values(200, 130))
    expected = numerics.dequantise_fp8(codes, scale)
    np.testing.assert_array_equal(numerics.dequantise_fp8(codes, scale.astype(np.float32)), expected)
    np.testing.assert_array_equal(numerics.dequantise_fp8(codes.view(np.int8), scale.view(np.int8)), expected)


def test_fp4_weights_equal_fake_fp4() -> None:
    weight = ragged_values(70, 96)
    packed, scale = numerics.quantise_fp4(weight)
    assert (packed.dtype, packed.shape) == (np.int8, (70, 48))
    assert (scale.dtype, scale.shape) == (E8M0, (70, 3))
    np.testing.assert_array_equal(numerics.dequantise_fp4(packed, scale), numerics.fake_fp4(weight))


def test_quantising_a_quantised_weight_changes_nothing() -> None:
    weight = numerics.fake_fp4(ragged_values(64, 64))
    np.testing.assert_array_equal(numerics.dequantise_fp4(*numerics.quantise_fp4(weight)), weight)
    weight = numerics.dequantise_fp8(*numerics.quantise_fp8(ragged_values(200, 130)))
    np.testing.assert_array_equal(numerics.dequantise_fp8(*numerics.quantise_fp8(weight)), weight)


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ragged_values(70, 96)
    whole = numerics.quantise_fp4(weight)
    monkeypatch.setattr(numerics, "_BAND_ELEMENTS", 96 * 9)
    for a, b in zip(whole, numerics.quantise_fp4(weight), strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    np.testing.assert_array_equal(numerics.dequantise_fp4(*whole), numerics.fake_fp4(weight))


def test_bfloat16_weights_quantise_like_their_float32_values() -> None:
    weight = ragged_values(64, 128).astype(BF16)
    for quantise in (numerics.quantise_fp8, numerics.quantise_fp4):
        for a, b in zip(quantise(weight), quantise(weight.astype(np.float32)), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_hadamard_is_the_walsh_matrix_and_its_own_inverse() -> None:
    index = np.arange(128)
    odd = np.bitwise_count(index[:, None] & index[None, :]) % 2
    signs = np.where(odd, np.float32(-1), np.float32(1))
    np.testing.assert_array_equal(numerics.hadamard_128(np.eye(128)), signs * np.float32(128**-0.5))
    x = np.random.default_rng(0).standard_normal((3, 5, 128)).astype(np.float32)
    np.testing.assert_allclose(numerics.hadamard_128(numerics.hadamard_128(x)), x, atol=1e-6)
