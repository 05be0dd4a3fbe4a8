"""A checkpoint -> a GGUF file that llama.cpp reads: architecture deepseek4, no tokenizer.

Matrices become float32 or bf16, whatever the checkpoint stores; vectors, hyper-connections, positional
tables and routers stay float32, as in llama.cpp's own converter.
Source: llama.cpp, src/llama-arch.cpp (names and keys) and src/models/deepseek4.cpp (shapes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from v4graph.checkpoint import Checkpoint
from v4graph.config import ModelConfig
from v4graph.inventory import Role, TensorSpec, layer_tensors, model_tensors, scale_name
from v4graph.numerics import BF16, E4M3, dequantise_fp4, dequantise_fp8

Matrices = Literal["f32", "bf16"]
Array = npt.NDArray[Any]

ARCHITECTURE = "deepseek4"
SQRT_SOFTPLUS = 4  # llama_expert_gating_func_type
MODEL_NAMES = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
LAYER_NAMES = {
    "attn_norm.weight": "attn_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.experts.{e}.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.{e}.w2.weight": "ffn_down_exps.weight",
    "ffn.experts.{e}.w3.weight": "ffn_up_exps.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "hc_attn_fn": "hc_attn_fn.weight",
    "hc_attn_base": "hc_attn_base.weight",
    "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight",
    "hc_ffn_base": "hc_ffn_base.weight",
    "hc_ffn_scale": "hc_ffn_scale.weight",
}


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file and the checkpoint's tensors that it holds, stacked where several."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def write_gguf(
    checkpoint: Checkpoint,
    path: Path,
    matrices: Matrices,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write all weights but those of the MTP layers; `path` is there whole or not at all."""
    config = checkpoint.config
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE)
    _add_metadata(writer, config)
    targets = list(_targets(config, matrices))
    for target in targets:
        size = math.prod(target.shape) * target.dtype.itemsize
        kind = gguf.GGMLQuantizationType.BF16 if target.dtype == BF16 else None
        writer.add_tensor_info(target.name, target.shape, target.dtype, size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, target in enumerate(targets):
        report(done, len(targets))
        parts = [_values(checkpoint, source).astype(target.dtype, copy=False) for source in target.sources]
        data = np.stack(parts) if len(target.shape) == 3 else np.ascontiguousarray(parts[0])
        # numpy's files know no bf16: its bytes as integers.
        writer.write_tensor_data(data.view(np.uint16) if target.dtype == BF16 else data)
    writer.close()
    partial.rename(path)


def _targets(config: ModelConfig, matrices: Matrices) -> Iterator[Target]:
    for spec in model_tensors(config):
        yield Target(MODEL_NAMES[spec.name], (spec.name,), spec.shape, _dtype(spec, matrices))
    for i, layer in enumerate(config.layers):
        for spec in layer_tensors(config, layer):
            source, dtype = f"layers.{i}.{spec.name}", _dtype(spec, matrices)
            sources: tuple[str, ...] = (source,)
            shape = spec.shape
            if spec.role is Role.EXPERT:
                experts = range(config.n_routed_experts)
                sources = tuple(source.replace("{e}", str(e)) for e in experts)
                shape = (len(experts), *shape)
            yield Target(f"blk.{i}.{LAYER_NAMES[spec.name]}", sources, shape, dtype)


def _dtype(spec: TensorSpec, matrices: Matrices) -> np.dtype[Any]:
    if spec.role is Role.INT64:
        return np.dtype(np.int32)
    plain = spec.role is Role.F32 or len(spec.shape) == 1 or spec.name == "ffn.gate.weight"
    return BF16 if matrices == "bf16" and not plain else np.dtype(np.float32)


def _values(checkpoint: Checkpoint, name: str) -> Array:
    data = checkpoint.array(name)
    if data.dtype == np.int8:
        return dequantise_fp4(data, checkpoint.array(scale_name(name)))
    if data.dtype == E4M3:
        return dequantise_fp8(data, checkpoint.array(scale_name(name)))
    return data


def _integers(config: ModelConfig) -> dict[str, int]:
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "embedding_length_out": config.hidden_size * config.hc_mult,
        "block_count": len(config.layers),
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_gating_func": SQRT_SOFTPLUS,
        "hash_layer_count": sum(layer.routing == "hash" for layer in config.layers),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.sliding_window": config.sliding_window,
        "attention.indexer.head_count": config.index_n_heads,
        "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "attention.output_group_count": config.o_groups,
        "attention.output_lora_rank": config.o_lora_rank,
        "hyper_connection.count": config.hc_mult,
        "hyper_connection.sinkhorn_iterations": config.hc_sinkhorn_iters,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    floats = {
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.compress_rope_freq_base": config.compress_rope.theta,
        "hyper_connection.epsilon": config.hc_eps,
        "expert_weights_scale": config.routed_scaling_factor,
        "rope.freq_base": config.rope.theta,
    }
    for key, value in _integers(config).items():
        writer.add_uint32(f"{ARCHITECTURE}.{key}", value)
    for key, number in floats.items():
        writer.add_float32(f"{ARCHITECTURE}.{key}", number)
    writer.add_bool(f"{ARCHITECTURE}.expert_weights_norm", val=True)
    for experts in ("exp", "shexp"):
        writer.add_array(
            f"{ARCHITECTURE}.swiglu_clamp_{experts}", [float(config.swiglu_limit)] * len(config.layers)
        )
    ratios = [layer.ratio for layer in config.layers]
    writer.add_array(f"{ARCHITECTURE}.attention.compress_ratios", ratios)
    _add_yarn(writer, config)
    writer.add_string("tokenizer.ggml.model", "none")


def _add_yarn(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    rope, prefix = config.compress_rope, f"{ARCHITECTURE}.rope.scaling."
    if rope.factor == 1:
        # Without a type llama.cpp scales nothing, but takes the type to be linear.
        writer.add_string(prefix + "type", "none")
        return
    writer.add_string(prefix + "type", "yarn")
    writer.add_float32(prefix + "factor", rope.factor)
    writer.add_uint32(prefix + "original_context_length", rope.original_max_position_embeddings)
    writer.add_float32(prefix + "yarn_beta_fast", rope.beta_fast)
    writer.add_float32(prefix + "yarn_beta_slow", rope.beta_slow)
