"""nano's numbers -> official config.json and a freshly initialised transformers model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

RATIOS = (0, 128, 4, 128)
LAYER_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}

# The same keys, in the same order, as config.json of the released models.
OFFICIAL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 256,
    "index_head_dim": 128,
    "index_n_heads": 16,
    "index_topk": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 128,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 1280,
    "compress_rope_theta": 160000,
    "compress_ratios": list(RATIOS),
}
# Keys that transformers spells otherwise; `transformers_config` gives its spelling.
RENAMED = (
    "architectures", "compress_ratios", "expert_dtype", "model_type", "num_hash_layers", "qk_rope_head_dim",
    "quantization_config", "rope_scaling", "topk_method", "torch_dtype", "transformers_version",
)  # fmt: skip


def write_official_config(folder: Path) -> None:
    """Write config.json and generation_config.json in the form of the released models."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = {
        "_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "do_sample": True,
        "temperature": 1.0, "top_p": 1.0, "transformers_version": OFFICIAL["transformers_version"],
    }  # fmt: skip
    for name, content in (("config.json", OFFICIAL), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def transformers_config() -> DeepseekV4Config:
    """Return the same numbers in the spelling of transformers."""
    rotary = OFFICIAL["qk_rope_head_dim"] / OFFICIAL["head_dim"]
    yarn = {key: value for key, value in OFFICIAL["rope_scaling"].items() if key != "type"}
    rope = {
        "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary},
        "compress": {
            "rope_type": "yarn", "rope_theta": 160000.0, "partial_rotary_factor": rotary,
            "attention_factor": 1.0, **yarn, "factor": 16.0,
        },
    }  # fmt: skip
    layers, hashed = OFFICIAL["num_hidden_layers"], OFFICIAL["num_hash_layers"]
    config = DeepseekV4Config(
        **{key: value for key, value in OFFICIAL.items() if key not in RENAMED},
        layer_types=[LAYER_TYPES[ratio] for ratio in RATIOS],
        mlp_layer_types=["hash_moe"] * hashed + ["moe"] * (layers - hashed),
        compress_rates={LAYER_TYPES[4]: 4, LAYER_TYPES[128]: 128},
        partial_rotary_factor=rotary,
        rope_parameters=rope,
    )
    config._attn_implementation = "eager"
    return config


def build_model(seed: int) -> DeepseekV4ForCausalLM:
    """Return an untrained fp32 model whose every tensor is a function of `seed`."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(transformers_config()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initialise(name, parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(hash_table(buffer.shape[0], buffer.shape[1], OFFICIAL["n_routed_experts"]))
    return model


def initialise(name: str, parameter: torch.Tensor) -> None:
    """Fill one parameter: unit variance per row, outputs and head small, streams kept apart by mHC."""
    if name.endswith(("norm.weight", "layernorm.weight")):
        parameter.fill_(1.0)
    elif name.endswith("_hc.base"):
        copies = OFFICIAL["hc_mult"]
        parameter.zero_()
        parameter[2 * copies :].view(copies, copies).fill_diagonal_(2.0)
    elif name.endswith((".sinks", ".position_bias", "hc_base")):
        parameter.zero_()
    elif name.endswith((".scale", "hc_scale")):
        parameter.fill_(0.5)
    elif name.endswith("embed_tokens.weight"):
        parameter.normal_(std=0.3)
    elif name.endswith((".fn", "hc_fn")):
        parameter.normal_(std=0.02)
    elif name.endswith("lm_head.weight"):
        parameter.normal_(std=0.01)
    elif name.endswith(("down_proj", "down_proj.weight", "o_b_proj.weight")):
        parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    else:
        parameter.normal_(std=parameter.shape[-1] ** -0.5)


def hash_table(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    """Return [tokens, top_k] distinct experts per token, by multiplicative hashing."""
    ids = torch.arange(tokens, dtype=torch.int64)
    first = (ids * 2654435761 >> 12) % experts
    step = 1 + (ids * 40503 >> 4) % (experts // top_k - 1)
    return (first[:, None] + step[:, None] * torch.arange(top_k)) % experts


def stored_bytes(model: DeepseekV4ForCausalLM) -> int:
    """Return the bytes of the official storage format: FP8, FP4 experts, bf16 and fp32 for the rest."""
    fp8 = ("q_a_proj", "q_b_proj", "o_a_proj", "o_b_proj", "self_attn.kv_proj", "shared_experts")
    fp32 = ("_hc.", "hc_head", "sinks", "position_bias", "e_score_correction_bias")
    total = 0.0
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            width = 8.0
        elif ".experts." in name:
            width = 0.5 + 1 / 32
        elif any(part in name for part in fp8):
            width = 1 + 1 / 128**2
        else:
            width = 4.0 if any(part in name for part in fp32) else 2.0
        total += tensor.numel() * width
    return round(total)
