"""Bytes of the states: the window, compressed and index caches by precision, and the compressors' tails.

Caches exist in the graph's dtype. Packed rows (FP8 latent rows of 584 bytes, FP4 index keys of 68) are what
the published figures assume; no graph holds them yet, so their bytes are predictions.
Source: DeepSeek-V4's cache layout as its servers keep it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from v4graph.config import Layer, ModelConfig
from v4graph.launch.calls import SLACK
from v4graph.states import layer_states

KvType = Literal["fp8", "bf16", "fp32"]
IndexType = Literal["fp4", "fp8", "bf16", "fp32"]
_ITEM = {"bf16": 2, "fp32": 4}
_FP8_GROUP, _FP4_GROUP, _ROW_ALIGNMENT = 64, 32, 8


@dataclass(frozen=True)
class CacheFormat:
    """Precision of the latent rows (window and compressed) and of the indexer's keys."""

    kv: KvType = "bf16"
    index: IndexType = "bf16"

    @property
    def exists(self) -> bool:
        """Whether v4graph exports graphs with such caches, or the bytes are a prediction."""
        return self.kv == self.index and self.kv in _ITEM

    def kv_row(self, config: ModelConfig) -> int:
        """Return the bytes of one latent row.

        FP8: e4m3 with one e8m0 scale per 64 channels, the RoPE channels in bf16, padded to 8 bytes.
        """
        if self.kv in _ITEM:
            return config.head_dim * _ITEM[self.kv]
        plain = config.head_dim - config.qk_rope_head_dim
        row = plain + -(-plain // _FP8_GROUP) + 2 * config.qk_rope_head_dim
        return -(-row // _ROW_ALIGNMENT) * _ROW_ALIGNMENT

    def index_row(self, config: ModelConfig) -> int:
        """Return the bytes of one index key: FP4 with an e8m0 scale per 32, FP8 with one float32 scale."""
        width = config.index_head_dim
        packed = {"fp4": width // 2 + width // _FP4_GROUP, "fp8": width + 4}
        return packed[self.index] if self.index in packed else width * _ITEM[self.index]

    @property
    def index_flop_weight(self) -> float:
        """FP8 equivalents of one FLOP of the indexer's scores: its rate follows the keys' precision."""
        return {"fp4": 0.5, "fp8": 1, "bf16": 2, "fp32": 4}[self.index]


# The technical report counts attention, whose products are bf16 whatever its rows are stored as, twice.
ATTENTION_FLOP_WEIGHT = 2
PACKED = CacheFormat("fp8", "fp4")


@dataclass(frozen=True)
class LayerState:
    """State bytes of one layer and one slot: caches by tokens per row, and what does not grow."""

    window: int
    tails: int
    rows: Mapping[str, tuple[int, int]]

    def total(self, capacity: int) -> int:
        """Return the bytes with room for `capacity` tokens."""
        return self.window + self.tails + self.cache(capacity)

    def cache(self, capacity: int) -> int:
        """Return the bytes of the caches that grow."""
        return sum(capacity // ratio * nbytes for ratio, nbytes in self.rows.values())

    @property
    def per_token(self) -> float:
        """Bytes that one more token takes, on average."""
        return sum(nbytes / ratio for ratio, nbytes in self.rows.values())


def layer_state(config: ModelConfig, layer: Layer, cache: CacheFormat, slack: int = SLACK) -> LayerState:
    """Return the state of one layer, of the shapes that the exporter gives its states."""
    window, tails, rows = 0, 0, {}
    for state in layer_states(config, layer, slack, "float32"):
        height, width = state.shape[1:]
        if state.name == "window":
            window += int(height) * cache.kv_row(config)
        elif state.rule == "append":
            row = cache.index_row(config) if state.name == "index_keys" else cache.kv_row(config)
            rows[state.name] = (state.ratio, row)
        else:
            tails += math.prod((int(height), int(width), 4))
    return LayerState(window, tails, rows)


def state_bytes(config: ModelConfig, cache: CacheFormat, capacity: int, slack: int = SLACK) -> int:
    """Return the bytes of one slot with room for `capacity` tokens, as `Session.state_bytes` counts them."""
    return sum(layer_state(config, layer, cache, slack).total(capacity) for layer in config.layers)


def bytes_per_token(config: ModelConfig, cache: CacheFormat) -> float:
    """Return the bytes that each token adds to the caches of all layers."""
    return sum(layer_state(config, layer, cache).per_token for layer in config.layers)
