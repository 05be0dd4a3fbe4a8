"""Which weights can be stored in the official FP8/FP4 format, and the conversion of one weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.config import ModelConfig, WeightFormat
from v4graph.errors import CheckpointError
from v4graph.inventory import FP8_BLOCK, Role, TensorSpec, layer_tensors, mtp_tensors, scale_name
from v4graph.numerics import BF16, quantise_fp4, quantise_fp8

# Dequantised to bf16 before use: its input is not quantised, so its blocks may be ragged.
_PLAIN_INPUT = "attn.wo_a.weight"


def check_quantisable(config: ModelConfig, weights: WeightFormat) -> None:
    """Check that activations divide into the 1x128 blocks that quantised weights need.

    Raises:
        CheckpointError: a weight has a number of inputs that is not a multiple of 128.
    """
    if not weights.quantised:
        return
    specs = [
        (f"layers.{i}.", spec)
        for i, layer in enumerate(config.layers)
        for spec in layer_tensors(config, layer)
    ]
    for k in range(len(config.mtp_layers)):
        specs += [(f"mtp.{k}.", spec) for spec in mtp_tensors(config, k)]
    for prefix, spec in specs:
        if (
            spec.role in (Role.LINEAR, Role.EXPERT)
            and spec.name != _PLAIN_INPUT
            and spec.shape[1] % FP8_BLOCK
        ):
            raise CheckpointError(
                f"{prefix}{spec.name}: {spec.shape[1]} inputs cannot be quantised in blocks of {FP8_BLOCK}; "
                "keep this model unquantised, or train it with a multiple of 128 there."
            )


def quantise_weight(spec: TensorSpec, data: npt.NDArray[Any]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Yield a float weight as the official format stores it: the tensor, and its scale if it has one.

    Raises:
        CheckpointError: the weight holds NaN or infinity.
    """
    if spec.role is Role.INT64:
        yield spec.name, data
        return
    if not np.isfinite(data).all():
        raise CheckpointError(
            f"{spec.name}: holds NaN or infinity, which cannot be stored; check the training run."
        )
    if spec.role in (Role.FLOAT, Role.F32):
        yield spec.name, data.astype(BF16 if spec.role is Role.FLOAT else np.float32, copy=False)
        return
    weight, scale = quantise_fp4(data) if spec.role is Role.EXPERT else quantise_fp8(data)
    yield spec.name, weight
    yield scale_name(spec.name), scale
