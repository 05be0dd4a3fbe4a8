"""Rewritten configurations are consistent: shrunk, in the hub form, with another weight format."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from tiny import CSA, HCA, transformers_form

from v4graph.config import OFFICIAL, UNQUANTISED, ModelConfig, WeightFormat
from v4graph.config.hub import hub_form, with_weights
from v4graph.errors import ConfigError


def read(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_dict(raw, source="config.json")


@pytest.mark.parametrize("raw", [tiny.RAW, transformers_form()], ids=["hub", "transformers"])
def test_shrinking_keeps_a_consistent_config(raw: dict[str, Any]) -> None:
    config = read(raw)
    small = config.shrink(layers=1, experts=3)
    assert small.layers == config.layers[:1] and small.n_routed_experts == 3
    assert small.mtp_layers == config.mtp_layers
    assert read(small.raw) == small
    assert config.raw == raw, "the original is left alone"
    assert config.shrink() == config


@pytest.mark.parametrize(("layers", "experts"), [(5, None), (0, None), (None, 1), (None, 5)])
def test_shrinking_out_of_range_is_refused(layers: int | None, experts: int | None) -> None:
    with pytest.raises(ConfigError, match="cannot shrink to"):
        tiny.config().shrink(layers, experts)


def test_hash_ignores_formatting_and_sees_values() -> None:
    shuffled = read(dict(reversed(tiny.RAW.items())))
    assert shuffled.sha256 == tiny.config().sha256 != tiny.config(rope_theta=10001).sha256


def test_hub_form_of_a_transformers_config_is_the_same_model() -> None:
    ours = read(transformers_form())
    raw = hub_form(ours, OFFICIAL)
    assert read(raw) == tiny.config()
    assert raw["compress_ratios"] == [0, 4, 128, 4, 0] and "layer_types" not in raw


def test_models_beyond_the_hub_form_keep_their_form() -> None:
    ours = read(transformers_form(compress_rates={CSA: 4, HCA: 16}))
    raw = hub_form(ours, OFFICIAL)
    assert "compress_ratios" not in raw
    assert read(raw).layers == ours.layers and read(raw).weight_format == OFFICIAL


@pytest.mark.parametrize("weights", [OFFICIAL, UNQUANTISED, WeightFormat("fp8", "float32", "fp8")])
def test_written_weight_formats_read_back(weights: WeightFormat) -> None:
    assert read(with_weights(tiny.RAW, weights)).weight_format == weights
