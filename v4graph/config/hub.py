"""Writes config.json for a given weight format, in the official hub form where it can say the model."""

from __future__ import annotations

from typing import Any

from v4graph.config.keys import FIXED, FLOATS, INTEGERS
from v4graph.config.model import ModelConfig
from v4graph.config.structure import RATIO_TYPES, TYPE_KINDS
from v4graph.config.types import Rope, WeightFormat

# Ignored by v4graph, but of use to others who read the file.
_KEPT = (
    "architectures",
    "initializer_range",
    "use_cache",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
)
_DEFAULTS: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "torch_dtype": "bfloat16"}
_KINDS = {ratio: TYPE_KINDS[name] for ratio, name in RATIO_TYPES.items()}


def with_weights(raw: dict[str, Any], weights: WeightFormat) -> dict[str, Any]:
    """Return `raw` announcing `weights` in quantization_config and expert_dtype."""
    kept = {key: value for key, value in raw.items() if key not in ("quantization_config", "expert_dtype")}
    if not weights.quantised:
        return kept
    quantisation: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    if weights.scale == "e8m0":
        quantisation["scale_fmt"] = "ue8m0"
    return {**kept, "expert_dtype": weights.expert, "quantization_config": quantisation}


def hub_form(config: ModelConfig, weights: WeightFormat) -> dict[str, Any]:
    """Return config.json in the official form, or in the form it had where that form cannot say it.

    The official form knows only the ratios 4 and 128, hash layers in front, and plain RoPE in layers
    without compression.
    """
    layers = (*config.layers, *config.mtp_layers)
    hashed = sum(layer.routing == "hash" for layer in config.layers)
    official = (
        all(_KINDS.get(layer.ratio) == layer.attention for layer in layers)
        and all(layer.routing == "hash" for layer in config.layers[:hashed])
        and config.rope.factor == 1
    )
    if not official:
        return with_weights(config.raw, weights)
    raw = {**_DEFAULTS, **{key: config.raw[key] for key in _KEPT if config.raw.get(key) is not None}}
    raw |= {key: value for key, value in FIXED.items() if key not in ("mlp_bias", "is_encoder_decoder")}
    raw |= {key: getattr(config, key) for key in (*INTEGERS, *FLOATS)}
    raw |= {
        "model_type": "deepseek_v4",
        "num_hidden_layers": len(config.layers),
        "num_nextn_predict_layers": len(config.mtp_layers),
        "num_hash_layers": hashed,
        "compress_ratios": [layer.ratio for layer in layers],
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_theta": config.rope.theta,
        "compress_rope_theta": config.compress_rope.theta,
        "rope_scaling": _scaling(config.compress_rope),
    }
    return dict(sorted(with_weights(raw, weights).items()))


def _scaling(rope: Rope) -> dict[str, Any] | None:
    if rope.factor == 1:
        return None
    return {
        "type": "yarn",
        "factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }
