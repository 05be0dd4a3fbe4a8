"""Random transformers models: the graph oracle in exact float32 arithmetic.

Small sizes with every feature on: all attention kinds, hash and top-k routing, sinks, position
biases, an active clamp. At least 16 index heads, or scores tie at exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM


@dataclass(frozen=True)
class Case:
    """Sizes of one oracle: `small` crosses every boundary in a few dozen tokens."""

    name: str
    window: int
    hca_ratio: int
    index_topk: int
    tokens: int
    vocab: int = 97
    csa_ratio: int = 4


SMALL = Case("small", window=8, hca_ratio=16, index_topk=4, tokens=93)
REAL_RATIOS = Case("real_ratios", window=128, hca_ratio=128, index_topk=16, tokens=321)

_EXPERTS, _TOP_EXPERTS = 8, 2
_ATTENTION = {"window": "sliding_attention", "hca": "heavily_compressed_attention"}
_LAYERS = (
    ("sliding_attention", "hash_moe"),
    ("heavily_compressed_attention", "hash_moe"),
    ("compressed_sparse_attention", "moe"),
    ("heavily_compressed_attention", "moe"),
    ("compressed_sparse_attention", "moe"),
)


def _config(case: Case) -> DeepseekV4Config:
    shared = {"partial_rotary_factor": 0.5}
    yarn = {"factor": 16.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 256}
    config = DeepseekV4Config(
        vocab_size=case.vocab,
        hidden_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=len(_LAYERS),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        q_lora_rank=48,
        o_groups=2,
        o_lora_rank=32,
        n_routed_experts=_EXPERTS,
        num_experts_per_tok=_TOP_EXPERTS,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        swiglu_limit=0.6,
        layer_types=[attention for attention, _ in _LAYERS],
        mlp_layer_types=[mlp for _, mlp in _LAYERS],
        compress_rates={
            "compressed_sparse_attention": case.csa_ratio,
            "heavily_compressed_attention": case.hca_ratio,
        },
        sliding_window=case.window,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=case.index_topk,
        hc_mult=4,
        hc_sinkhorn_iters=20,
        num_nextn_predict_layers=0,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        compress_rope_theta=160000.0,
        partial_rotary_factor=0.5,
        rope_parameters={
            "main": {"rope_type": "default", "rope_theta": 10000.0, **shared},
            "compress": {
                "rope_type": "yarn",
                "rope_theta": 160000.0,
                "attention_factor": 1.0,
                **yarn,
                **shared,
            },
        },
        bos_token_id=0,
        eos_token_id=1,
    )
    config._attn_implementation = "eager"
    return config


def _fill(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random values with a spread that keeps every feature alive."""

    def normal(spread: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * spread

    if name.endswith("tid2eid"):
        rows = [torch.randperm(_EXPERTS, generator=generator)[:_TOP_EXPERTS] for _ in range(shape[0])]
        return torch.stack(rows)
    if "norm" in name:
        return 1 + normal(0.2)
    if name.endswith(("sinks", "e_score_correction_bias")):
        return normal(0.5)
    if name.endswith(("position_bias", ".base", "hc_base")) or "embed_tokens" in name:
        return normal(1.0)
    if name.endswith((".scale", "hc_scale")):
        return 0.5 + 0.5 * torch.rand(shape, generator=generator)
    if name.endswith((".fn", "hc_fn")):
        return normal(0.05)
    gain = 2.0 if "gate_proj" in name and "compressor" in name else 1.0
    return normal(gain * shape[-1] ** -0.5)


def build(case: Case, seed: int) -> Any:
    """Return a random model in float32 with eager attention, in eval mode."""
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(_config(case)).float().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    extra = ("e_score_correction_bias", "tid2eid")
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith(extra))]
    with torch.no_grad():
        for name, tensor in tensors:
            tensor.copy_(_fill(name, tensor.shape, generator).to(tensor.dtype))
    return model


def save(model: Any, folder: Path) -> Path:
    """Save as a user would: `save_pretrained`."""
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def full_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits float32 [B, S, V] of one stateless forward pass."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits
