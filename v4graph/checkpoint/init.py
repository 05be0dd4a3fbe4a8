"""A configuration and a seed -> a random checkpoint in the official format.

Weights are scaled so that activations keep a sane size: matrices by their inputs, norms near one.
Quantised matrices are drawn as codes through a table of normal quantiles, not computed in float.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.checkpoint.quantise import check_quantisable
from v4graph.checkpoint.writer import SHARD_BYTES, CheckpointWriter, Progress
from v4graph.config import FILE_NAME, OFFICIAL, ModelConfig, WeightFormat
from v4graph.config.hub import with_weights
from v4graph.errors import CheckpointError
from v4graph.inventory import Role, StoredTensor, TensorSpec, inventory, stored, weight_specs
from v4graph.numerics import BF16, E8M0, encode_e2m1, encode_e4m3

Array = npt.NDArray[Any]

_BAND_ELEMENTS = 1 << 22
# Standard deviation of the codes that the tables below hold.
_FP8_SPREAD = 100.0
_FP4_SPREAD = 2.0
# Mean and standard deviation of what is not a matrix; the first suffix that fits counts.
_VECTORS = (
    ("norm.weight", 1.0, 0.2),
    ("attn_sink", 0.0, 0.5),
    ("gate.bias", 0.0, 0.5),
    ("ape", 0.0, 1.0),
    ("_base", 0.0, 1.0),
    ("_scale", 0.75, 0.15),
    ("embed.weight", 0.0, 1.0),
)


def init(
    config: ModelConfig,
    dst: str | Path,
    seed: int,
    *,
    weights: WeightFormat | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a random checkpoint, the same for the same config, format and seed, to the new directory `dst`.

    `weights` is the config's own format if it announces a quantised one, otherwise FP8 and FP4.
    Use `ModelConfig.shrink` for fewer layers or experts.

    Raises:
        CheckpointError: `dst` exists, or the model's sizes do not divide into quantisation blocks.
    """
    if seed < 0:
        raise CheckpointError(f"seed is {seed}, expected an integer of at least 0.")
    weights = weights or (config.weight_format if config.weight_format.quantised else OFFICIAL)
    check_quantisable(config, weights)
    with CheckpointWriter(Path(dst), inventory(config, weights), shard_bytes, progress) as writer:
        for spec in weight_specs(config):
            rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(spec.name.encode())]))
            weight, *scale = stored(spec, weights)
            writer.write_parts(weight.name, _draw(spec, weight, config, rng))
            for target in scale:
                codes = _FP4_SPREAD if weight.dtype == "I8" else _FP8_SPREAD
                writer.write(target.name, _scales(target, _spread(spec) / codes, rng))
        text = json.dumps(with_weights(config.raw, weights), indent=2)
        writer.write_text(FILE_NAME, text + "\n")


def _draw(
    spec: TensorSpec, target: StoredTensor, config: ModelConfig, rng: np.random.Generator
) -> Iterator[Array]:
    """Yield a random weight in bands of rows."""
    rows, *rest = target.shape
    # tid2eid picks among all experts for every token, which takes a wider row than it stores.
    width = config.n_routed_experts if spec.role is Role.INT64 else math.prod(rest)
    step = max(1, _BAND_ELEMENTS // max(width, 1))
    for top in range(0, rows, step):
        shape = (min(step, rows - top), *rest)
        if spec.role is Role.INT64:
            yield rng.random((shape[0], width), np.float32).argsort(axis=1)[:, : shape[1]].astype(np.int64)
        elif target.dtype in ("F8_E4M3", "I8"):
            table = _fp8_codes() if target.dtype == "F8_E4M3" else _fp4_bytes()
            yield table[rng.integers(0, 1 << 16, shape, np.uint16)]
        else:
            values = _floats(spec, shape, rng)
            yield values if target.dtype == "F32" else values.astype(BF16)


def _floats(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    mean, spread = next(
        (pair for suffix, *pair in _VECTORS if spec.name.endswith(suffix)), (0.0, _spread(spec))
    )
    return rng.standard_normal(shape, np.float32) * np.float32(spread) + np.float32(mean)


def _spread(spec: TensorSpec) -> float:
    """Return the standard deviation of a matrix: unit outputs for unit inputs, more where softmax follows."""
    gain = 2.0 if spec.name.endswith("wgate.weight") else 1.6 if spec.name.endswith("_fn") else 1.0
    return float(gain * spec.shape[-1] ** -0.5)


def _scales(target: StoredTensor, size: float, rng: np.random.Generator) -> Array:
    """Return block scales near `size`: the powers of two around it, or any value within an octave."""
    if target.dtype == "F32":
        factors: Array = np.float32(size) * np.exp2(rng.random(target.shape, np.float32) - 0.5)
        return factors
    exponents = math.floor(math.log2(size)) + rng.integers(0, 2, target.shape, np.int16)
    return (exponents + 127).astype(np.uint8).view(E8M0)


def _normal_quantiles(count: int) -> npt.NDArray[np.float32]:
    return np.sort(np.random.Generator(np.random.SFC64(0)).standard_normal(count, np.float32))


@functools.cache
def _fp8_codes() -> Array:
    """e4m3 codes of a normal distribution, [65536]."""
    return encode_e4m3(_FP8_SPREAD * _normal_quantiles(1 << 16))


@functools.cache
def _fp4_bytes() -> Array:
    """Pairs of e2m1 codes of a normal distribution, packed, [65536]."""
    codes = encode_e2m1(_FP4_SPREAD * _normal_quantiles(1 << 8))
    return (codes[None, :] | codes[:, None] << np.uint8(4)).reshape(-1).view(np.int8)
