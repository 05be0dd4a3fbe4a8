"""config.json is read in both spellings, and what would change the model unnoticed is refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CSA, HCA, transformers_form

from v4graph.config import OFFICIAL, UNQUANTISED, Layer, ModelConfig, Rope, WeightFormat
from v4graph.config.keys import IGNORED, READ
from v4graph.config.structure import ROPE_KEYS
from v4graph.errors import ConfigError

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "configs"


def read(raw: dict[str, Any], **options: bool) -> ModelConfig:
    return ModelConfig.from_dict(raw, source="config.json", **options)


def test_flash_and_pro_presets_have_the_published_layers() -> None:
    flash, pro = ModelConfig.load("flash"), ModelConfig.load("pro")
    kinds = [[layer.attention for layer in config.layers] for config in (flash, pro)]
    assert [[kind.count(name) for name in ("window", "csa", "hca")] for kind in kinds] == [
        [2, 21, 20],
        [0, 30, 31],
    ]
    assert [layer.routing for layer in flash.layers[:4]] == ["hash", "hash", "hash", "topk"]
    assert flash.layers[2].kind == "csa_hash"
    assert flash.mtp_layers == pro.mtp_layers == (Layer("window", 0, "topk"),)
    assert (flash.routed_scaling_factor, pro.routed_scaling_factor) == (1.5, 2.5)


def test_absent_expert_dtype_means_fp4() -> None:
    assert "expert_dtype" not in ModelConfig.load("flash").raw
    assert ModelConfig.load("flash").weight_format == ModelConfig.load("pro").weight_format == OFFICIAL


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_presets_are_the_golden_configs(name: str) -> None:
    path = GOLDEN / f"{name}.config.json"
    if not path.is_file():
        pytest.skip("the golden configs are not beside this checkout")
    assert ModelConfig.load(name).raw == json.loads(path.read_text())


def test_yarn_frequencies_have_the_published_values() -> None:
    frequencies = ModelConfig.load("flash").compress_rope.frequencies()
    published = [
        5.28685632e-3, 3.63553858e-3, 2.265625e-3, 1.39680129e-3, 8.49689727e-4, 5.08081963e-4,
        2.96977778e-4, 1.68179989e-4, 9.0867843e-5, 4.54442323e-5, 1.953125e-5, 5.37231267e-6,
    ]  # fmt: skip
    assert frequencies.dtype == np.float32 and frequencies.shape == (32,)
    np.testing.assert_allclose(frequencies[14:26], published, rtol=1e-6)
    np.testing.assert_allclose(frequencies[31], 5.68052904e-7, rtol=1e-6)


def test_plain_frequencies_are_powers_of_theta() -> None:
    expected = 10000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(Rope(10000, 64).frequencies(), expected, rtol=1e-6)


def test_both_spellings_give_the_same_model() -> None:
    hub, ours = tiny.config(quantization_config=None, expert_dtype=None), read(transformers_form())
    assert hub == ours
    assert ours.weight_format == UNQUANTISED


def test_transformers_form_takes_any_ratio() -> None:
    config = read(transformers_form(compress_rates={CSA: 2, HCA: 16}))
    assert [layer.ratio for layer in config.layers] == [0, 2, 16, 2]
    legacy = read(transformers_form(compress_rates=None, compress_rate_csa=2, compress_rate_hca=16))
    assert legacy.layers == config.layers


def test_hash_layers_may_stand_anywhere_in_the_transformers_form() -> None:
    config = read(transformers_form(mlp_layer_types=["moe", "hash_moe", "moe", "moe"]))
    assert [layer.routing for layer in config.layers] == ["topk", "hash", "topk", "topk"]


def test_base_checkpoints_have_fp8_experts_and_float_scales() -> None:
    assert tiny.config(expert_dtype="fp8").weight_format == WeightFormat("fp8", "float32", "fp8")
    moved = {**tiny.RAW["quantization_config"], "expert_dtype": "fp8"}
    assert tiny.config(expert_dtype=None, quantization_config=moved).weight_format.expert == "fp8"


def test_token_ids_may_be_listed_or_absent() -> None:
    config = tiny.config(eos_token_id=[7, 8], bos_token_id=None)
    assert (config.eos_token_id, config.bos_token_id) == (7, -1)


def test_ratio_list_without_mtp_entry_means_a_window_layer() -> None:
    assert tiny.config(compress_ratios=[0, 4, 128, 4]).mtp_layers == (Layer("window", 0, "topk"),)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"compres_ratios": []},
            r"unknown key 'compres_ratios'; did you mean 'compress_ratios'\? It may",
        ),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3', expected 'deepseek_v4'"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_size": "128"}, "hidden_size is '128', expected an integer of at least 1"),
        ({"hidden_size": True}, "hidden_size is True, expected an integer"),
        ({"hidden_size": 12.5}, "hidden_size is 12.5, expected an integer"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0, expected a number of at least 0"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; v4graph supports only 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; v4graph supports only 1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; v4graph supports only 'silu'"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; v4graph supports only 'sqrtsoftplus'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; v4graph supports only 'noaux_tc'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False; v4graph supports only True"),
        ({"attention_bias": True}, "attention_bias is True; v4graph supports only False"),
        ({"mlp_bias": True}, "mlp_bias is True; v4graph supports only False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; v4graph supports only False"),
        ({"compress_ratios": [0, 4, 64, 4, 0]}, r"compress_ratios\[2\] is 64, an unknown compress ratio"),
        (
            {"compress_ratios": [0, False, 4, 4, 0]},
            r"compress_ratios\[1\] is False, an unknown compress ratio",
        ),
        (
            {"compress_ratios": [0, 4]},
            "compress_ratios has 2 entries, expected num_hidden_layers = 4, or 5 with",
        ),
        ({"compress_ratios": "0,4"}, "compress_ratios is '0,4', expected a list"),
        ({"compress_ratios": None}, "neither compress_ratios nor layer_types is there"),
        (
            {"num_hash_layers": 5},
            "num_hash_layers = 5 is larger than the model, which has num_hidden_layers = 4",
        ),
        ({"num_hash_layers": None}, "key 'num_hash_layers' is missing"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types and compress_ratios disagree"),
        ({"mlp_layer_types": ["moe"] * 3 + ["hash_moe"]}, "mlp_layer_types and num_hash_layers disagree"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type is 'linear'; v4graph supports"),
        ({"rope_scaling": {"typ": "yarn"}}, "unknown key 'typ' in rope_scaling; did you mean 'type'?"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling: key 'factor' is missing"),
        ({"rope_scaling": []}, r"rope_scaling is \[\], expected an object"),
        ({"rope_theta": None}, "key 'rope_theta' is missing"),
        ({"qk_rope_head_dim": 63}, "63 rotated channels per head; RoPE needs an even number"),
        ({"qk_rope_head_dim": None}, "neither qk_rope_head_dim nor partial_rotary_factor is there"),
        ({"partial_rotary_factor": 0.25}, "qk_rope_head_dim = 64 is not partial_rotary_factor = 0.25"),
        ({"qk_rope_head_dim": 256}, "qk_rope_head_dim = 256 is more than head_dim = 128"),
        ({"o_groups": 3}, "o_groups = 3 does not divide num_attention_heads = 2"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is more than n_routed_experts = 4"),
        ({"expert_dtype": "nvfp4"}, "expert_dtype is 'nvfp4'; v4graph supports 'fp4' and 'fp8'"),
        ({"quantization_config": None}, "expert_dtype is 'fp4' but there is no quantization_config"),
    ],
)
def test_hub_form_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.json: .*{message}"):
        tiny.config(**changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quant_method", "gptq", "quant_method is 'gptq'; v4graph supports only 'fp8'"),
        ("fmt", "e5m2", "fmt is 'e5m2'; v4graph supports only 'e4m3'"),
        ("activation_scheme", "static", "activation_scheme is 'static'; v4graph supports only 'dynamic'"),
        (
            "weight_block_size",
            [1, 128],
            r"weight_block_size is \[1, 128\]; v4graph supports only \[128, 128\]",
        ),
        ("scale_fmt", "float", "scale_fmt is 'float'; v4graph supports only 'ue8m0'"),
        ("scale_fm", "ue8m0", "unknown key 'scale_fm' in quantization_config; did you mean 'scale_fmt'?"),
    ],
)
def test_other_quantisations_are_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.config(quantization_config={**tiny.RAW["quantization_config"], key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 4},
            r"layer_types\[0\] is 'full_attention'.*; expected one of sliding",
        ),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 entries, expected num_hidden_layers = 4"),
        (
            {"mlp_layer_types": ["dense"] * 4},
            r"mlp_layer_types\[0\] is 'dense'; expected one of hash_moe, moe",
        ),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types has 1 entries, expected num_hidden_layers = 4"),
        (
            {"compress_rates": {CSA: 0}},
            "compress_rates: compressed_sparse_attention is 0, expected an integer",
        ),
        ({"compress_rates": {"csa": 4}}, "unknown key 'csa' in compress_rates"),
        ({"rope_parameters": {"main": {"rope_theta": 10000}}}, "rope_parameters has no 'compress'"),
        ({"rope_theta": 50000}, "main.rope_theta = 10000.0 and rope_theta = 50000 disagree"),
    ],
)
def test_transformers_form_errors_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(transformers_form(**changes))


def test_yarn_without_unit_amplitude_is_refused() -> None:
    rope = transformers_form()["rope_parameters"]
    del rope["compress"]["attention_factor"]
    with pytest.raises(ConfigError, match=r"attention_factor is None, expected 1\.0"):
        read(transformers_form(rope_parameters=rope))


def test_unknown_keys_can_be_allowed() -> None:
    raw = {**tiny.RAW, "new_feature": 1, "other_feature": 2}
    with pytest.raises(
        ConfigError, match=r"unknown key 'new_feature' .and 1 more: other_feature.*--allow-unknown"
    ):
        read(raw)
    assert read(raw, allow_unknown=True) == tiny.config()


def test_base_keys_of_transformers_are_ignored() -> None:
    assert read({**tiny.RAW, **dict.fromkeys(IGNORED, "anything")}) == tiny.config()
    assert not IGNORED & READ


def test_inference_config_names_the_file_to_give() -> None:
    with pytest.raises(
        ConfigError, match=r"this is the official inference/config.json .* give the config.json"
    ):
        read({"dim": 4096, "n_layers": 43})


def test_paths_directories_and_presets_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.RAW))
    assert ModelConfig.load(tmp_path) == ModelConfig.load(tmp_path / "config.json") == tiny.config()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flash").mkdir()
    (tmp_path / "flash" / "config.json").write_text(json.dumps(tiny.RAW))
    assert ModelConfig.load("flash") == tiny.config(), "an existing path wins over a preset"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list, expected an object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.load(path)
    assert str(path) in str(error.value)


def test_missing_sources_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"or preset; did you mean 'flash'\? Give a config\.json"):
        ModelConfig.load("flahs")
    with pytest.raises(ConfigError, match=r"no config\.json in this directory"):
        ModelConfig.load(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(list(ROPE_KEYS)), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(hub=st.booleans(), key=st.sampled_from(sorted(READ)), value=JSON)
def test_any_value_of_any_key_is_read_or_refused_clearly(hub: bool, key: str, value: Any) -> None:
    raw = {**(tiny.RAW if hub else transformers_form()), key: value}
    with contextlib.suppress(ConfigError):
        config = read(raw)
        assert config.layers and np.isfinite(config.rope.frequencies()).all()
        assert np.isfinite(config.compress_rope.frequencies()).all()
