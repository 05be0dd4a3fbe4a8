"""`pack` keeps every value; `quantise` rounds as the codecs do and writes the official format."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from tiny import write

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import COMPANIONS, pack
from v4graph.config import OFFICIAL, UNQUANTISED, WeightFormat
from v4graph.errors import CheckpointError
from v4graph.inventory import Role, inventory, scale_name, weight_specs
from v4graph.numerics import quantise_fp4, quantise_fp8

BASE = WeightFormat("fp8", "float32", "fp8")


def make(path: Path, weights: WeightFormat) -> Path:
    init(tiny.config(), path, seed=0, weights=weights)
    for name in COMPANIONS[:2]:
        (path / name).write_text(name)
    return path


@pytest.mark.parametrize("weights", [OFFICIAL, UNQUANTISED, BASE])
@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_packing_keeps_every_value(tmp_path: Path, weights: WeightFormat, shard_bytes: int) -> None:
    make(tmp_path / "x", weights)
    pack(tmp_path / "x", tmp_path / "y", shard_bytes=shard_bytes)
    source, packed = Checkpoint.open(tmp_path / "x"), Checkpoint.open(tmp_path / "y")
    packed.check()
    assert packed.packed and packed.weights == weights and packed.config == source.config
    assert not [name for name in packed.tensors if ".experts.0." in name]
    for name in source.tensors:
        a, b = source.array(name), packed.array(name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_packing_copies_config_and_tokenizer(tmp_path: Path) -> None:
    make(tmp_path / "x", OFFICIAL)
    for quantise, source in ((False, "x"), (True, "f")):
        if quantise:
            make(tmp_path / "f", UNQUANTISED)
        pack(tmp_path / source, tmp_path / f"y{quantise}", quantise=quantise)
        names = {path.name for path in (tmp_path / f"y{quantise}").iterdir()}
        assert names == {"model.safetensors", "config.json", *COMPANIONS[:2]}
    assert (tmp_path / "yFalse/config.json").read_bytes() == (tmp_path / "x/config.json").read_bytes()


def test_packing_twice_changes_nothing(tmp_path: Path) -> None:
    make(tmp_path / "x", OFFICIAL)
    pack(tmp_path / "x", tmp_path / "y")
    pack(Checkpoint.open(tmp_path / "y"), tmp_path / "z")
    assert (tmp_path / "y/model.safetensors").read_bytes() == (tmp_path / "z/model.safetensors").read_bytes()


def test_located_experts_of_a_packed_file_are_their_bytes(tmp_path: Path) -> None:
    make(tmp_path / "x", OFFICIAL)
    pack(tmp_path / "x", tmp_path / "y")
    packed = Checkpoint.open(tmp_path / "y")
    path, offset, size = packed.tensors.location("layers.1.ffn.experts.2.w3.weight")
    assert (
        path.read_bytes()[offset : offset + size]
        == packed.array("layers.1.ffn.experts.2.w3.weight").tobytes()
    )


def test_an_incomplete_mtp_layer_is_kept_as_it_is(tmp_path: Path) -> None:
    make(tmp_path / "x", OFFICIAL)
    source = Checkpoint.open(tmp_path / "x")
    kept = {
        name: source.array(name) for name in source.tensors if not name.startswith("mtp.0.ffn.experts.1.")
    }
    write(tmp_path / "y", kept)
    pack(tmp_path / "y", tmp_path / "z")
    names = set(Checkpoint.open(tmp_path / "z").tensors)
    assert "mtp.0.ffn.experts.2.w1.weight" in names and "layers.0.ffn.experts.w1.weight" in names


def test_quantising_gives_the_official_inventory_and_the_codecs_values(tmp_path: Path) -> None:
    make(tmp_path / "x", UNQUANTISED)
    pack(tmp_path / "x", tmp_path / "y", quantise=True)
    source, target = Checkpoint.open(tmp_path / "x"), Checkpoint.open(tmp_path / "y")
    target.check()
    assert not target.packed and target.weights == target.config.weight_format == OFFICIAL
    assert target.config.raw["expert_dtype"] == "fp4" and target.config == tiny.config()
    found = {(name, target.tensors.header(name).dtype) for name in target.tensors}
    assert found == {(tensor.name, tensor.dtype) for tensor in inventory(tiny.config())}
    for spec in weight_specs(tiny.config()):
        data = source.array(spec.name)
        if spec.role not in (Role.LINEAR, Role.EXPERT):
            np.testing.assert_array_equal(target.array(spec.name), data)
            continue
        parts = (quantise_fp4 if spec.role is Role.EXPERT else quantise_fp8)(data)
        for name, expected in zip((spec.name, scale_name(spec.name)), parts, strict=True):
            np.testing.assert_array_equal(target.array(name).view(np.uint8), expected.view(np.uint8))


def test_quantising_stores_other_tensors_in_their_official_types(tmp_path: Path) -> None:
    make(tmp_path / "x", UNQUANTISED)
    source = Checkpoint.open(tmp_path / "x")
    text = (tmp_path / "x/config.json").read_text()
    swapped = {name: source.array(name) for name in source.tensors}
    swapped["embed.weight"] = swapped["embed.weight"].astype(np.float32)
    swapped["layers.0.hc_attn_fn"] = swapped["layers.0.hc_attn_fn"].astype(ml_dtypes.bfloat16)
    write(tmp_path / "y", swapped, text)
    pack(tmp_path / "y", tmp_path / "z", quantise=True)
    target = Checkpoint.open(tmp_path / "z")
    assert target.array("embed.weight").dtype == ml_dtypes.bfloat16
    assert target.array("layers.0.hc_attn_fn").dtype == np.float32


def test_quantising_a_packed_checkpoint_unstacks_it(tmp_path: Path) -> None:
    make(tmp_path / "x", UNQUANTISED)
    pack(tmp_path / "x", tmp_path / "packed")
    pack(tmp_path / "x", tmp_path / "a", quantise=True)
    pack(tmp_path / "packed", tmp_path / "b", quantise=True)
    prints = [Checkpoint.open(tmp_path / name).fingerprint(data=True) for name in "ab"]
    assert prints[0] == prints[1]


def test_quantising_without_mtp_tensors_leaves_them_out(tmp_path: Path) -> None:
    make(tmp_path / "x", UNQUANTISED)
    source = Checkpoint.open(tmp_path / "x")
    main = {name: source.array(name) for name in source.tensors if not name.startswith("mtp.")}
    write(tmp_path / "y", main, (tmp_path / "x/config.json").read_text())
    pack(tmp_path / "y", tmp_path / "z", quantise=True)
    assert not [name for name in Checkpoint.open(tmp_path / "z").tensors if name.startswith("mtp.")]


def test_left_over_mtp_tensors_are_reported_when_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path / "x", UNQUANTISED)
    raw = json.loads((tmp_path / "x/config.json").read_text())
    raw |= {"num_nextn_predict_layers": 0, "compress_ratios": raw["compress_ratios"][:4]}
    (tmp_path / "x/config.json").write_text(json.dumps(raw))
    pack(tmp_path / "x", tmp_path / "y", quantise=True)
    assert "MTP tensors left out" in caplog.text


def test_quantising_twice_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "x", OFFICIAL)
    with pytest.raises(CheckpointError, match="is quantised already; use `v4graph pack` without --quantize"):
        pack(tmp_path / "x", tmp_path / "y", quantise=True)


def test_sizes_that_do_not_divide_into_blocks_are_named(tmp_path: Path) -> None:
    init(tiny.config(moe_intermediate_size=96), tmp_path / "x", 0, weights=UNQUANTISED)
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.ffn\.experts\.\{e\}\.w2\.weight: 96 inputs cannot be"
    ):
        pack(tmp_path / "x", tmp_path / "y", quantise=True)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_cannot_be_stored_are_named(tmp_path: Path, value: float) -> None:
    make(tmp_path / "x", UNQUANTISED)
    source = Checkpoint.open(tmp_path / "x")
    arrays = {name: source.array(name) for name in source.tensors}
    name = "layers.2.attn.wkv.weight"
    arrays[name] = arrays[name].copy()
    arrays[name][3, 4] = value
    write(tmp_path / "y", arrays, (tmp_path / "x/config.json").read_text())
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN or infinity"):
        pack(tmp_path / "y", tmp_path / "z", quantise=True)
    assert not (tmp_path / "z").exists()


def test_an_unsound_source_or_existing_target_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "x", OFFICIAL)
    with pytest.raises(CheckpointError, match="x: exists already"):
        pack(tmp_path / "x", tmp_path / "x")
    source = Checkpoint.open(tmp_path / "x")
    write(tmp_path / "y", {name: source.array(name) for name in source.tensors if name != "norm.weight"})
    with pytest.raises(CheckpointError, match=r"1 tensor missing \(norm\.weight\)"):
        pack(tmp_path / "y", tmp_path / "z")
