"""The small value types of a model configuration: RoPE flavour, layer kind, weight format.

Source: DeepSeek-V4 inference/model.py (precompute_freqs_cis) and the published config.json files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Attention = Literal["window", "csa", "hca"]
Routing = Literal["hash", "topk"]


@dataclass(frozen=True)
class Rope:
    """One RoPE flavour over the last `dim` channels; YaRN when `factor` is not 1.

    The amplitude is always 1: DeepSeek-V4 applies no attention factor.
    """

    theta: float
    dim: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32
    beta_slow: float = 1

    def frequencies(self) -> npt.NDArray[np.float32]:
        """Return the angle per position of each channel pair, float32 [dim/2], computed in float64."""
        pairs = np.arange(self.dim // 2, dtype=np.float64)
        base = self.theta ** (-2 * pairs / self.dim)
        if self.factor == 1:
            return base.astype(np.float32)
        low = max(math.floor(self._correction(self.beta_fast)), 0)
        high = min(math.ceil(self._correction(self.beta_slow)), self.dim - 1)
        # A width of zero would divide by zero; 0.001 is what every implementation of YaRN uses.
        width = high - low if high != low else 0.001
        ramp = np.clip((pairs - low) / width, 0, 1)
        return (base * (1 - ramp) + base / self.factor * ramp).astype(np.float32)

    def _correction(self, rotations: float) -> float:
        """Return the channel that turns `rotations` times within the original context."""
        span = self.original_max_position_embeddings / (2 * math.pi * rotations)
        return self.dim * math.log(span) / (2 * math.log(self.theta))


@dataclass(frozen=True)
class Layer:
    """One decoder layer: attention kind, tokens per compressed entry (0: none), expert routing."""

    attention: Attention
    ratio: int
    routing: Routing

    @property
    def kind(self) -> str:
        """Name of the layer kind, such as `csa_topk`."""
        return f"{self.attention}_{self.routing}"


@dataclass(frozen=True)
class WeightFormat:
    """How a checkpoint stores its matrices.

    Attributes:
        linear: FP8 with one scale per 128x128 block, or plain bf16 / fp32.
        scale: Type of the FP8 block scales; FP4 scales are always e8m0.
        expert: FP4 with one scale per row and 32 columns, FP8 like `linear`, or plain.
        plain: Type of all plain matrices, embedding and head among them; float32 also where only some are
            stored so, or as fp16.
    """

    linear: Literal["fp8", "float"]
    scale: Literal["e8m0", "float32"]
    expert: Literal["fp4", "fp8", "float"]
    plain: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def quantised(self) -> bool:
        """Whether the linear layers are stored in FP8."""
        return self.linear == "fp8"


OFFICIAL = WeightFormat(linear="fp8", scale="e8m0", expert="fp4")
UNQUANTISED = WeightFormat(linear="float", scale="e8m0", expert="float")
