"""The structured parts of config.json, in both spellings: layers, RoPE flavours, weight format.

Source: the published config.json files and transformers' DeepseekV4Config.__post_init__.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from v4graph.config.types import UNQUANTISED, Attention, Layer, Rope, Routing, WeightFormat
from v4graph.config.values import Raw, items, number, table
from v4graph.errors import ConfigError, near_match

# Hub form: the ratio names the kind. transformers: the type does, and its ratio is free.
RATIO_TYPES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}
TYPE_KINDS: dict[str, Attention] = dict(zip(RATIO_TYPES.values(), get_args(Attention), strict=True))
RATE_DEFAULTS = {kind: ratio for ratio, kind in RATIO_TYPES.items() if ratio}
RATE_LEGACY = dict(zip(RATE_DEFAULTS, ("compress_rate_csa", "compress_rate_hca"), strict=True))
MLP_ROUTING: dict[str, Routing] = {"hash_moe": "hash", "moe": "topk"}
ROPE_KEYS = frozenset(
    (
        "type",
        "rope_type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "attention_factor",
        "truncate",
    )
)
QUANTISATION_FIXED: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
# transformers' integration keys: which modules it converts, not how the stored tensors read.
QUANTISATION_IGNORED = frozenset(("modules_to_not_convert", "dequantize"))

_Kind = tuple[Attention, int]


def read_layers(raw: Raw, source: str) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """Return the decoder layers and the MTP layers."""
    count = number(raw, "num_hidden_layers", source, int, 1)
    announced = raw.get("num_nextn_predict_layers")
    mtp = 0 if announced is None else number(raw, "num_nextn_predict_layers", source, int, 0)
    main, tail = _read_attention(raw, count, mtp, source)
    routing = _read_routing(raw, count, source)
    layers = tuple(Layer(kind, ratio, route) for (kind, ratio), route in zip(main, routing, strict=True))
    return layers, tuple(Layer(kind, ratio, "topk") for kind, ratio in tail)


def _read_attention(raw: Raw, count: int, mtp: int, source: str) -> tuple[list[_Kind], list[_Kind]]:
    """Return kind and ratio of each decoder layer and each MTP layer."""
    if raw.get("layer_types") is None and raw.get("compress_ratios") is None:
        raise ConfigError(
            f"{source}: neither compress_ratios nor layer_types is there; one of them must list the layers."
        )
    main: list[_Kind] = []
    tail: list[_Kind] = [("window", 0)] * mtp
    if raw.get("compress_ratios") is not None:
        kinds = _kinds_from_ratios(raw, source)
        if len(kinds) not in (count, count + mtp):
            wanted = f"num_hidden_layers = {count}" + (
                f", or {count + mtp} with the MTP layers" if mtp else ""
            )
            raise ConfigError(f"{source}: compress_ratios has {len(kinds)} entries, expected {wanted}.")
        main, tail = kinds[:count], kinds[count:] or tail
    if raw.get("layer_types") is not None:
        kinds = _kinds_from_types(raw, source)
        if len(kinds) != count:
            raise ConfigError(
                f"{source}: layer_types has {len(kinds)} entries, expected num_hidden_layers = {count}."
            )
        if main and main != kinds:
            raise ConfigError(f"{source}: layer_types and compress_ratios disagree; remove one of them.")
        main = kinds
    return main, tail


def _kinds_from_ratios(raw: Raw, source: str) -> list[_Kind]:
    kinds: list[_Kind] = []
    for i, ratio in enumerate(items(raw, "compress_ratios", source)):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in RATIO_TYPES:
            raise ConfigError(
                f"{source}: compress_ratios[{i}] is {ratio!r}, an unknown compress ratio; expected 0, 4 "
                "or 128 (other ratios need the form with layer_types and compress_rates)."
            )
        kinds.append((TYPE_KINDS[RATIO_TYPES[ratio]], ratio))
    return kinds


def _kinds_from_types(raw: Raw, source: str) -> list[_Kind]:
    rates: Raw = dict(RATE_DEFAULTS)
    if raw.get("compress_rates") is not None:
        rates |= table(raw, "compress_rates", source, frozenset(RATE_DEFAULTS))
    rates |= {kind: raw[key] for kind, key in RATE_LEGACY.items() if raw.get(key) is not None}
    ratios = {kind: number(rates, kind, f"{source}: compress_rates", int, 1) for kind in RATE_DEFAULTS}
    kinds: list[_Kind] = []
    for i, name in enumerate(items(raw, "layer_types", source)):
        if not isinstance(name, str) or name not in TYPE_KINDS:
            raise ConfigError(
                f"{source}: layer_types[{i}] is {name!r}; expected one of {', '.join(TYPE_KINDS)}"
                f"{near_match(str(name), TYPE_KINDS) or '.'}"
            )
        kinds.append((TYPE_KINDS[name], ratios.get(name, 0)))
    return kinds


def _read_routing(raw: Raw, count: int, source: str) -> list[Routing]:
    if raw.get("mlp_layer_types") is None:
        hashed = number(raw, "num_hash_layers", source, int, 0)
        if hashed > count:
            raise ConfigError(
                f"{source}: num_hash_layers = {hashed} is larger than the model, "
                f"which has num_hidden_layers = {count}."
            )
        return ["hash" if i < hashed else "topk" for i in range(count)]
    types = items(raw, "mlp_layer_types", source)
    for i, name in enumerate(types):
        if not isinstance(name, str) or name not in MLP_ROUTING:
            known = ", ".join(MLP_ROUTING)
            raise ConfigError(f"{source}: mlp_layer_types[{i}] is {name!r}; expected one of {known}.")
    if len(types) != count:
        raise ConfigError(
            f"{source}: mlp_layer_types has {len(types)} entries, expected num_hidden_layers = {count}."
        )
    hashed = types.count("hash_moe")
    announced = (
        hashed if raw.get("num_hash_layers") is None else number(raw, "num_hash_layers", source, int, 0)
    )
    if announced != hashed:
        raise ConfigError(f"{source}: mlp_layer_types and num_hash_layers disagree; remove one of them.")
    return [MLP_ROUTING[name] for name in types]


def read_rope_dim(raw: Raw, head_dim: int, source: str) -> int:
    """Return the number of rotated channels, qk_rope_head_dim or its share of head_dim."""
    share = None
    if raw.get("partial_rotary_factor") is not None:
        share = number(raw, "partial_rotary_factor", source, float, 0)
    if raw.get("qk_rope_head_dim") is not None:
        dim = number(raw, "qk_rope_head_dim", source, int, 2)
    elif share is not None:
        dim = int(head_dim * share)
    else:
        raise ConfigError(f"{source}: neither qk_rope_head_dim nor partial_rotary_factor is there.")
    if share is not None and int(head_dim * share) != dim:
        raise ConfigError(
            f"{source}: qk_rope_head_dim = {dim} is not partial_rotary_factor = {share} "
            f"of head_dim = {head_dim}; remove one of them."
        )
    if dim < 2 or dim % 2:
        raise ConfigError(f"{source}: {dim} rotated channels per head; RoPE needs an even number >= 2.")
    return dim


def read_ropes(raw: Raw, dim: int, source: str) -> tuple[Rope, Rope]:
    """Return the RoPE of layers without compression and that of CSA and HCA layers."""
    if raw.get("rope_parameters") is None:
        scaling: Raw = {}
        if raw.get("rope_scaling") is not None:
            # The hub form leaves the amplitude out and means 1.
            scaling = {"attention_factor": 1.0, **table(raw, "rope_scaling", source, ROPE_KEYS)}
        main = _rope({"rope_theta": raw.get("rope_theta")}, dim, source)
        scaling["rope_theta"] = raw.get("compress_rope_theta")
        return main, _rope(scaling, dim, f"{source}: rope_scaling")
    both = table(raw, "rope_parameters", source, frozenset(("main", "compress")))
    ropes = []
    for label, key in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        if label not in both:
            raise ConfigError(f"{source}: rope_parameters has no '{label}'; it needs main and compress.")
        where = f"{source}: rope_parameters.{label}"
        rope = _rope(table(both, label, f"{source}: rope_parameters", ROPE_KEYS), dim, where)
        if raw.get(key) is not None and raw[key] != rope.theta:
            raise ConfigError(f"{where}.rope_theta = {rope.theta} and {key} = {raw[key]} disagree.")
        ropes.append(rope)
    return ropes[0], ropes[1]


def _rope(values: Raw, dim: int, source: str) -> Rope:
    theta = number(values, "rope_theta", source, float, 2)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return Rope(theta, dim)
    if kind != "yarn":
        raise ConfigError(f"{source}: rope type is {kind!r}; v4graph supports 'default' and 'yarn'.")
    if values.get("attention_factor") != 1:
        raise ConfigError(
            f"{source}: attention_factor is {values.get('attention_factor')!r}, expected 1.0; "
            "DeepSeek-V4 does not scale the rotated amplitude."
        )
    if values.get("truncate", True) is not True:
        raise ConfigError(f"{source}: truncate is {values['truncate']!r}; v4graph supports only true.")
    return Rope(
        theta,
        dim,
        factor=number(values, "factor", source, float, 1),
        original_max_position_embeddings=number(values, "original_max_position_embeddings", source, int, 1),
        beta_fast=number({"beta_fast": 32, **values}, "beta_fast", source, float, 0.001),
        beta_slow=number({"beta_slow": 1, **values}, "beta_slow", source, float, 0.001),
    )


def read_weight_format(raw: Raw, source: str) -> WeightFormat:
    """Return the weight format that config.json announces.

    Without expert_dtype the experts of a quantised model are FP4, as in Flash's launch config.json.
    """
    known = frozenset(QUANTISATION_FIXED) | QUANTISATION_IGNORED | {"scale_fmt", "expert_dtype"}
    expert = raw.get("expert_dtype")
    if raw.get("quantization_config") is None:
        if expert is not None:
            raise ConfigError(f"{source}: expert_dtype is {expert!r} but there is no quantization_config.")
        narrow = (raw.get("dtype") or raw.get("torch_dtype") or "bfloat16") == "bfloat16"
        return UNQUANTISED if narrow else replace(UNQUANTISED, plain="float32")
    quantisation = table(raw, "quantization_config", source, known)
    where = f"{source}: quantization_config"
    for key, wanted in QUANTISATION_FIXED.items():
        value = quantisation.get(key, None if key == "quant_method" else wanted)
        if value != wanted:
            raise ConfigError(f"{where}.{key} is {value!r}; v4graph supports only {wanted!r}.")
    scale = quantisation.get("scale_fmt")
    if scale not in (None, "ue8m0"):
        raise ConfigError(f"{where}.scale_fmt is {scale!r}; v4graph supports only 'ue8m0'.")
    expert = quantisation.get("expert_dtype", expert) or "fp4"
    if expert == "fp4":
        return WeightFormat("fp8", "e8m0" if scale else "float32", "fp4")
    if expert == "fp8":
        # Base checkpoints (FP8 experts) store their scales as F32.
        return WeightFormat("fp8", "float32", "fp8")
    raise ConfigError(f"{source}: expert_dtype is {expert!r}; v4graph supports 'fp4' and 'fp8'.")
