"""The keys of config.json: which are read, which are ignored, which values are refused.

Turns the parsed JSON of either spelling into the fields of `v4graph.config.ModelConfig`.
Source: the published config.json files and transformers' DeepseekV4Config.__post_init__.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4graph.config.structure import read_layers, read_rope_dim, read_ropes, read_weight_format
from v4graph.config.values import number, token
from v4graph.errors import ConfigError, near_match

INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
FLOATS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
# Keys with one supported value, which is also the meaning of an absent key.
FIXED: Mapping[str, Any] = {
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
}
_STRUCTURE = """
    model_type num_hidden_layers num_nextn_predict_layers compress_ratios num_hash_layers layer_types
    mlp_layer_types compress_rates compress_rate_csa compress_rate_hca rope_theta compress_rope_theta
    rope_scaling rope_parameters qk_rope_head_dim partial_rotary_factor bos_token_id eos_token_id
    quantization_config expert_dtype
"""
READ = frozenset((*_STRUCTURE.split(), *INTEGERS, *FLOATS, *FIXED))
# transformers' base configuration, training and generation keys: none of them changes the graph.
_IGNORED = """
    architectures auto_map dtype torch_dtype transformers_version name_or_path _name_or_path _commit_hash
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    experts_implementation _experts_implementation _experts_implementation_internal
    add_cross_attention cross_attention_hidden_size chunk_size_feed_forward is_decoder tie_encoder_decoder
    output_attentions output_hidden_states output_router_logits output_scores return_dict
    return_dict_in_generate id2label label2id num_labels problem_type finetuning_task task_specific_params
    tokenizer_class prefix pruned_heads torchscript use_bfloat16 tf_legacy_loss use_cache initializer_range
    attention_dropout router_aux_loss_coef router_jitter_noise pad_token_id sep_token_id
    decoder_start_token_id bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
    length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences remove_invalid_values repetition_penalty suppress_tokens temperature top_k top_p
    typical_p
"""
IGNORED = frozenset(_IGNORED.split())


def read_fields(raw: Any, source: str, allow_unknown: bool) -> dict[str, Any]:
    """Return the fields of `ModelConfig` except `raw`.

    Raises:
        ConfigError: a key is unknown or missing, or a value is one that v4graph does not support.
    """
    _check_keys(raw, source, allow_unknown)
    for key, wanted in FIXED.items():
        if raw.get(key, wanted) not in (wanted, None):
            raise ConfigError(f"{source}: {key} is {raw[key]!r}; v4graph supports only {wanted!r}.")
    fields: dict[str, Any] = {key: number(raw, key, source, int, 1) for key in INTEGERS}
    fields |= {key: number(raw, key, source, float, 0) for key in FLOATS}
    layers, mtp_layers = read_layers(raw, source)
    dim = read_rope_dim(raw, fields["head_dim"], source)
    rope, compress_rope = read_ropes(raw, dim, source)
    fields |= {
        "layers": layers,
        "mtp_layers": mtp_layers,
        "qk_rope_head_dim": dim,
        "rope": rope,
        "compress_rope": compress_rope,
        "n_shared_experts": 1,
        "bos_token_id": token(raw, "bos_token_id", source),
        "eos_token_id": token(raw, "eos_token_id", source),
        "weight_format": read_weight_format(raw, source),
    }
    _check_sizes(fields, source)
    return fields


def _check_keys(raw: Any, source: str, allow_unknown: bool) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: holds a JSON {type(raw).__name__}, expected an object of config keys.")
    if "dim" in raw and "n_layers" in raw:
        raise ConfigError(
            f"{source}: this is the official inference/config.json (dim, n_layers, ...); "
            "give the config.json beside it, one directory up (hidden_size, num_hidden_layers, ...)."
        )
    if raw.get("model_type") != "deepseek_v4":
        raise ConfigError(f"{source}: model_type is {raw.get('model_type')!r}, expected 'deepseek_v4'.")
    unknown = sorted(raw.keys() - READ - IGNORED)
    if unknown and not allow_unknown:
        raise ConfigError(
            f"{source}: unknown key '{unknown[0]}'"
            + (f" (and {len(unknown) - 1} more: {', '.join(unknown[1:6])})" if unknown[1:] else "")
            + (near_match(unknown[0], READ | IGNORED) or ".")
            + " It may change the model, so go on only with --allow-unknown-config-keys."
        )


def _check_sizes(fields: Mapping[str, Any], source: str) -> None:
    heads, groups = fields["num_attention_heads"], fields["o_groups"]
    if heads % groups:
        raise ConfigError(f"{source}: o_groups = {groups} does not divide num_attention_heads = {heads}.")
    used, experts = fields["num_experts_per_tok"], fields["n_routed_experts"]
    if used > experts:
        raise ConfigError(
            f"{source}: num_experts_per_tok = {used} is more than n_routed_experts = {experts}."
        )
    rope = fields["qk_rope_head_dim"]
    for key in ("head_dim", "index_head_dim"):
        if rope > fields[key]:
            raise ConfigError(f"{source}: qk_rope_head_dim = {rope} is more than {key} = {fields[key]}.")
