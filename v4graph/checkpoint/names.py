"""Tensor names of every spelling -> official names.

Besides the official names (`layers.0.attn.wq_a.weight`) there are those that transformers'
`save_pretrained` writes (official ones behind `model.`, with a few others at the roots) and its
module names (`model.layers.0.self_attn.q_a_proj.weight`, with fused and stacked experts).
Source: transformers conversion_mapping.py, and what save_pretrained was seen to write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ROOTS: Mapping[str, str] = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
_COMPRESSOR: Mapping[str, str] = {
    "position_bias": "ape",
    "kv_proj.weight": "wkv.weight",
    "gate_proj.weight": "wgate.weight",
    "kv_norm.weight": "norm.weight",
}
LEAVES: Mapping[str, str] = {
    "attn.norm.weight": "attn.kv_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    **{
        f"{part}_hc.{leaf}": f"hc_{part}_{leaf}"
        for part in ("attn", "ffn")
        for leaf in ("fn", "base", "scale")
    },
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    **{f"self_attn.compressor.{ours}": f"attn.compressor.{leaf}" for ours, leaf in _COMPRESSOR.items()},
    **{
        f"self_attn.compressor.indexer.{ours}": f"attn.indexer.compressor.{leaf}"
        for ours, leaf in _COMPRESSOR.items()
    },
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.experts.gate_up_proj": "ffn.experts.gate_up",
    "mlp.experts.down_proj": "ffn.experts.w2.weight",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
}
GATE_UP = ".ffn.experts.gate_up"
_LAYER = re.compile(r"((?:layers|mtp)\.\d+\.)(.+)")
_EXPERT = re.compile(r"(.+\.ffn\.experts)\.(\d+)\.(w[123]\.(?:weight|scale))")
_STACKED = re.compile(r".+\.ffn\.experts\.w[123]\.(?:weight|scale)")


def official_name(stored: str) -> str:
    """Return the official name of a stored tensor; unknown names come back without `model.`."""
    name = stored.removeprefix("model.")
    match = _LAYER.fullmatch(name)
    if match:
        return match[1] + LEAVES.get(match[2], match[2])
    return ROOTS.get(name, name)


def split_expert(name: str) -> tuple[str, int] | None:
    """Return the stacked name and the expert of `....ffn.experts.{e}.w1.weight`, None for other names."""
    match = _EXPERT.fullmatch(name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else None


def is_stacked(name: str) -> bool:
    """Whether a name is that of all experts of a layer in one tensor."""
    return _STACKED.fullmatch(name) is not None
