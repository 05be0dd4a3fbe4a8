"""The torch quantisers of the op references give the same bits as the numpy codecs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from v4graph import numerics
from v4graph.ops import rounding


def values(count: int, seed: int) -> np.ndarray:
    """Float32 over many magnitudes, with powers of two, midpoints and zeros among them."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(count) * 2.0 ** generator.integers(-30, 12, count)
    special = [0.0, 1.0, 448.0, 449.0, 464.0, 6.0, 5.0, 2.5, 1.75, 0.25, 2.0**-126, 1e-4, 7 * 2.0**-9]
    x[: 2 * len(special)] = special + [-value for value in special]
    return generator.permutation(x).astype(np.float32)


@pytest.mark.parametrize("block", [64, 128])
def test_fake_fp8_has_the_bits_of_the_codec(block: int) -> None:
    x = values(64 * 1024, seed=block).reshape(64, 1024)
    got = rounding.fake_fp8(torch.from_numpy(x), block).numpy()
    np.testing.assert_array_equal(got, numerics.fake_fp8(x, block))


def test_fake_fp4_has_the_bits_of_the_codec() -> None:
    x = values(64 * 1024, seed=4).reshape(64, 1024)
    np.testing.assert_array_equal(rounding.fake_fp4(torch.from_numpy(x)).numpy(), numerics.fake_fp4(x))


def test_power_of_two_is_exact_at_and_around_every_power() -> None:
    exact = 2.0 ** np.arange(-126, 127, dtype=np.float64)
    above, below = np.nextafter(exact.astype(np.float32), np.float32(np.inf)), exact.astype(np.float32)
    got = rounding.power_of_two_at_least(torch.from_numpy(np.concatenate([below, above]))).numpy()
    np.testing.assert_array_equal(got[: exact.size], exact.astype(np.float32))
    np.testing.assert_array_equal(got[exact.size :], (2 * exact).astype(np.float32))


def test_hadamard_is_the_walsh_matrix_and_its_own_inverse() -> None:
    x = torch.from_numpy(values(128 * 16, seed=9).reshape(16, 128)).clamp(-10, 10)
    once = rounding.hadamard_128(x)
    # Sums of 128 float32 values of up to 10 cancel: 1e-5 is an ulp of the largest partial sum.
    np.testing.assert_allclose(once.numpy(), numerics.hadamard_128(x.numpy()), rtol=0, atol=1e-5)
    np.testing.assert_allclose(rounding.hadamard_128(once).numpy(), x.numpy(), rtol=0, atol=1e-5)


def test_decoding_reads_every_code_like_the_codec() -> None:
    codes = np.arange(256, dtype=np.uint8).view(np.int8).reshape(2, 128)
    scale = np.full((1, 1), 120, np.int8)
    decoded = rounding.decode_fp8(torch.from_numpy(codes), torch.from_numpy(scale)).numpy()
    np.testing.assert_array_equal(decoded, codes.view("uint8").view(numerics.E4M3).astype(np.float32) / 128)
    rows = codes.reshape(16, 16)
    scales = np.full((16, 1), 130, np.uint8)
    decoded = rounding.decode_fp4(torch.from_numpy(rows), torch.from_numpy(scales.view(np.int8))).numpy()
    np.testing.assert_array_equal(decoded, numerics.dequantise_fp4(rows, scales.view(numerics.E8M0)))
