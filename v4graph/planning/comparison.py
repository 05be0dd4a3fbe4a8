"""V4 against DeepSeek-V3.2 at one context, for every cache precision, as the published ratios count.

FLOPs are 2 per active parameter, plus the indexer's scores, plus attention over the window and the selected
or compressed rows. Source: DeepSeek-V4's technical report; docs/planning.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from v4graph.config import ModelConfig
from v4graph.planning import reference
from v4graph.planning.cache import ATTENTION_FLOP_WEIGHT, CacheFormat, bytes_per_token
from v4graph.planning.weights import parameters

FORMATS = (
    CacheFormat("fp8", "fp4"),
    CacheFormat("fp8", "fp8"),
    CacheFormat("bf16", "bf16"),
    CacheFormat("fp32", "fp32"),
)


@dataclass(frozen=True)
class Ratio:
    """One cache precision against V3.2: bytes per token, bytes at the context, FLOPs raw and as FP8."""

    cache: CacheFormat
    bytes_per_token: float
    bytes: int
    cache_ratio: float
    flops_ratio: float
    fp8_flops: float
    fp8_ratio: float


def published_flops(config: ModelConfig, context: int) -> dict[str, int]:
    """Return the FLOPs of one decoded token that sees `context` tokens, as the published ratio counts."""
    heads, width, window = config.num_attention_heads, config.head_dim, config.sliding_window
    indexer = attention = 0
    for layer in config.layers:
        seen = {"window": 0, "csa": config.index_topk, "hca": context // max(layer.ratio, 1)}
        attention += 2 * heads * 2 * width * (window + seen[layer.attention])
        if layer.attention == "csa":
            indexer += 2 * config.index_n_heads * config.index_head_dim * context // layer.ratio
    return {"linear": 2 * parameters(config).active, "indexer": indexer, "attention": attention}


def fp8_equivalents(parts: Mapping[str, int], cache: CacheFormat) -> float:
    """Return `published_flops` with attention counted twice and the indexer by its keys' precision."""
    weighted = parts["linear"] + ATTENTION_FLOP_WEIGHT * parts["attention"]
    return weighted + cache.index_flop_weight * parts["indexer"]


def compare(config: ModelConfig, context: int) -> list[Ratio]:
    """Return the ratios of every cache precision."""
    parts = published_flops(config, context)
    raw = sum(parts.values()) / sum(reference.flops(context).values())
    found = []
    for cache in FORMATS:
        equivalents = fp8_equivalents(parts, cache)
        per_token = bytes_per_token(config, cache)
        found.append(
            Ratio(
                cache=cache,
                bytes_per_token=per_token,
                bytes=int(per_token * context),
                cache_ratio=per_token / reference.BYTES_PER_TOKEN,
                flops_ratio=raw,
                fp8_flops=equivalents,
                fp8_ratio=equivalents / reference.fp8_flops(context),
            )
        )
    return found
