"""The smallest model that the official format can store: every layer kind, one MTP layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.safetensors_file import NUMPY_DTYPES
from v4graph.checkpoint.writer import CheckpointWriter
from v4graph.config import ModelConfig
from v4graph.inventory import StoredTensor

RAW: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 128, 4, 0],
    "num_hash_layers": 2,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
    },
    "index_n_heads": 16,
    "index_head_dim": 128,
    "index_topk": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
HUB_ONLY = ("compress_ratios", "num_hash_layers", "rope_scaling", "expert_dtype", "quantization_config")


def config(**changes: Any) -> ModelConfig:
    """Return the tiny model with some keys of config.json changed; None removes a key."""
    raw = {key: value for key, value in {**RAW, **changes}.items() if value is not None}
    return ModelConfig.from_dict(raw, source="config.json")


def transformers_form(**changes: Any) -> dict[str, Any]:
    """The tiny model as transformers writes it."""
    raw = {key: value for key, value in RAW.items() if key not in HUB_ONLY}
    share = {"partial_rotary_factor": 0.5}
    yarn = {"factor": 16.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 256}
    raw |= {
        "layer_types": ["sliding_attention", CSA, HCA, CSA],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "compress_rates": {CSA: 4, HCA: 128},
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, **share},
            "compress": {
                "rope_type": "yarn",
                "rope_theta": 160000.0,
                "attention_factor": 1.0,
                **yarn,
                **share,
            },
        },
        **share,
    }
    return {key: value for key, value in {**raw, **changes}.items() if value is not None}


def write(path: Path, arrays: Mapping[str, np.ndarray], text: str | None = None) -> Checkpoint:
    """Write tensors as they are, whatever they are, beside a config.json (the tiny one by default)."""
    spelling = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
    planned = [StoredTensor(name, spelling[array.dtype], array.shape) for name, array in arrays.items()]
    with CheckpointWriter(path, planned) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
        writer.write_text("config.json", text or json.dumps(RAW))
    return Checkpoint.open(path)
