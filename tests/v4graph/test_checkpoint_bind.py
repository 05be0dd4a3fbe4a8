"""Bindings give the graph's dtype and shape, without a copy where the layout allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import pytest
import tiny

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import pack
from v4graph.config import UNQUANTISED, ModelConfig
from v4graph.errors import CheckpointError
from v4graph.manifest import Binding, Manifest
from v4graph.numerics import dequantise_fp4, dequantise_fp8

LINEAR = Binding(
    input="layers.{i}.attn.wq_b.weight",
    tensor="layers.{i}.attn.wq_b.weight",
    layers=(0, 1, 2, 3),
    experts=0,
    dtype="int8",
    shape=(256, 128),
    layout=("bytes",),
    stored_dtype="F8_E4M3",
)
EXPERTS = Binding(
    input="layers.{i}.ffn.experts.w1.weight",
    tensor="layers.{i}.ffn.experts.{e}.w1.weight",
    layers=(0, 1, 2, 3),
    experts=4,
    dtype="int8",
    shape=(4, 128, 64),
    layout=("stack",),
    stored_dtype="I8",
)
SCALES = replace(
    EXPERTS,
    input="layers.{i}.ffn.experts.w1.scale",
    tensor="layers.{i}.ffn.experts.{e}.w1.scale",
    shape=(4, 128, 4),
    layout=("bytes", "stack"),
    stored_dtype="F8_E8M0",
)
EMBED = Binding("embed.weight", "embed.weight", (), 0, "float32", (40, 128), ("cast",), "BF16")
SINK = replace(
    LINEAR,
    input="layers.{i}.attn.attn_sink",
    tensor="layers.{i}.attn.attn_sink",
    dtype="float32",
    shape=(2,),
    layout=("as-is",),
    stored_dtype="F32",
)


def manifest(*bindings: Binding, config: ModelConfig | None = None) -> Manifest:
    """Only what binding reads."""
    return cast(Manifest, SimpleNamespace(config=(config or tiny.config()).raw, bindings=bindings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bind")
    init(tiny.config(), path / "official", seed=0)
    init(tiny.config(), path / "float", seed=0, weights=UNQUANTISED)
    pack(path / "official", path / "packed")
    return path


@pytest.fixture
def official(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder / "official")


@pytest.fixture
def packed(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder / "packed")


def test_as_is_and_bytes_are_views(official: Checkpoint) -> None:
    weight, sink = official.bind(LINEAR, 1), official.bind(SINK, 1)
    assert (weight.dtype, weight.shape) == (np.int8, (256, 128))
    assert np.shares_memory(weight, official.array("layers.1.attn.wq_b.weight"))
    assert np.shares_memory(sink, official.array("layers.1.attn.attn_sink"))


def test_stack_joins_the_experts_in_order(official: Checkpoint) -> None:
    stacked = official.bind(EXPERTS, 2)
    assert (stacked.dtype, stacked.shape) == (np.int8, (4, 128, 64))
    for e in range(4):
        np.testing.assert_array_equal(stacked[e], official.array(f"layers.2.ffn.experts.{e}.w1.weight"))


@pytest.mark.parametrize("binding", [EXPERTS, SCALES])
def test_stack_on_a_packed_checkpoint_is_a_view_of_the_same_values(
    official: Checkpoint, packed: Checkpoint, binding: Binding
) -> None:
    for layer in range(4):
        got = packed.bind(binding, layer)
        assert not got.flags.owndata and not got.flags.writeable
        assert np.shares_memory(got, packed.array(f"layers.{layer}.ffn.experts.{binding.input[23:]}"))
        np.testing.assert_array_equal(got, official.bind(binding, layer))


def test_cast_widens_bfloat16(official: Checkpoint) -> None:
    got = official.bind(EMBED, None)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, official.array("embed.weight").astype(np.float32))


def test_bfloat16_is_a_view_where_the_graph_takes_it(official: Checkpoint) -> None:
    got = official.bind(replace(EMBED, dtype="bfloat16", layout=("as-is",)), None)
    assert got.dtype == ml_dtypes.bfloat16
    assert np.shares_memory(got, official.array("embed.weight"))


@pytest.mark.parametrize("stored", ["F32", "F16"])
def test_a_graph_that_takes_bfloat16_refuses_what_would_lose_bits(
    official: Checkpoint, tmp_path: Path, stored: str
) -> None:
    narrow = replace(EMBED, dtype="bfloat16", layout=("as-is",))
    arrays = {name: official.array(name) for name in official.tensors}
    arrays["embed.weight"] = arrays["embed.weight"].astype(np.float32 if stored == "F32" else np.float16)
    wide = tiny.write(tmp_path / "wide", arrays)
    with pytest.raises(CheckpointError, match=f"embed.weight is stored as {stored}, .* exported for BF16"):
        wide.bind(narrow, None)
    np.testing.assert_array_equal(wide.bind(EMBED, None), arrays["embed.weight"].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantise_multiplies_by_the_scale(official: Checkpoint, packed: Checkpoint, dtype: str) -> None:
    linear = replace(LINEAR, dtype=dtype, layout=("dequantise", "cast"), scale="layers.{i}.attn.wq_b.scale")
    experts = replace(
        EXPERTS,
        dtype=dtype,
        shape=(4, 128, 128),
        layout=("dequantise", "cast", "stack"),
        scale="layers.{i}.ffn.experts.{e}.w1.scale",
    )
    numpy_dtype = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    parts = [official.array(f"layers.1.attn.wq_b.{part}") for part in ("weight", "scale")]
    for checkpoint in (official, packed):
        np.testing.assert_array_equal(checkpoint.bind(linear, 1), dequantise_fp8(*parts).astype(numpy_dtype))
        stacked = checkpoint.bind(experts, 1)
        assert (stacked.dtype, stacked.shape) == (numpy_dtype, (4, 128, 128))
        for e in range(4):
            one = [official.array(f"layers.1.ffn.experts.{e}.w1.{part}") for part in ("weight", "scale")]
            np.testing.assert_array_equal(stacked[e], dequantise_fp4(*one).astype(numpy_dtype))


def test_floats_widen_where_the_graph_takes_float32(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder / "float")
    got = checkpoint.bind(replace(LINEAR, dtype="float32", layout=("cast",), stored_dtype="F32"), 0)
    np.testing.assert_array_equal(got, checkpoint.array("layers.0.attn.wq_b.weight").astype(np.float32))


def test_bound_yields_every_input_of_every_layer(official: Checkpoint) -> None:
    inputs = dict(official.bound(manifest(LINEAR, EXPERTS, EMBED)))
    names = [f"layers.{i}.{n}" for n in ("attn.wq_b.weight", "ffn.experts.w1.weight") for i in range(4)]
    assert list(inputs) == [*names, "embed.weight"]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            replace(LINEAR, tensor="layers.{i}.attn.wq_c.weight"),
            "no tensor layers.1.attn.wq_c.weight, which",
        ),
        (replace(LINEAR, shape=(512, 128)), r"gives shape \[256, 128\], the graph takes \[512, 128\]"),
        (
            replace(EXPERTS, shape=(4, 128, 32)),
            r"w1.weight gives shape \[128, 64\], .* \[128, 32\]",
        ),
        (replace(EXPERTS, experts=5, shape=(5, 128, 64)), "no tensor layers.1.ffn.experts.4.w1.weight"),
        (replace(LINEAR, stored_dtype="BF16", layout=("cast",)), "stored as F8_E4M3, .* exported for BF16"),
        (
            replace(EXPERTS, stored_dtype="F8_E4M3", layout=("bytes", "stack")),
            "stored as I8, .* for F8",
        ),
        (replace(SINK, dtype="bfloat16", stored_dtype="BF16"), "sink is stored as F32, .* exported for BF16"),
        (
            replace(LINEAR, dtype="float32", layout=("dequantise",), scale="layers.{i}.attn.wq_a.scale"),
            r"scale has shape \[1, 1\], .* its weight \[256, 128\]; expected \[2, 1\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    official: Checkpoint, packed: Checkpoint, binding: Binding, message: str
) -> None:
    for checkpoint in (official, packed):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.bind(binding, 1)


def test_a_wrong_checkpoint_is_refused_before_any_data_is_read(
    official: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_data(name: str) -> None:
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(official.tensors, "array", no_data)
    wrong = replace(LINEAR, shape=(1, 1))
    with pytest.raises(CheckpointError, match=r"export the graph again from this one\.$"):
        official.bound(manifest(EMBED, wrong))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"swiglu_limit": 7.0},
            "config.json gives swiglu_limit = 10.0, the graph was exported with 7.0; give",
        ),
        ({"rope_theta": 50000}, "config.json gives rope = Rope"),
        ({"compress_ratios": [0, 4, 4, 4, 0]}, "its 4 layers are not those of the graph, which has 4"),
        ({"num_hash_layers": 1}, "its 4 layers are not those of the graph"),
    ],
)
def test_another_model_of_the_same_shapes_is_refused(
    official: Checkpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        official.check_manifest(manifest(config=tiny.config(**changes)))


def test_a_deeper_checkpoint_and_other_tokens_fit(official: Checkpoint) -> None:
    official.check_manifest(manifest(config=tiny.config().shrink(layers=2)))
    official.check_manifest(manifest(config=tiny.config(eos_token_id=[1, 3], expert_dtype="fp8")))
