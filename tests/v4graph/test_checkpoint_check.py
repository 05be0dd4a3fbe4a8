"""`Checkpoint.check` names missing, unexpected and misshapen tensors from headers alone."""

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
from v4graph.checkpoint.pack import pack
from v4graph.config import UNQUANTISED
from v4graph.errors import CheckpointError

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    path = tmp_path_factory.mktemp("check") / "tiny"
    init(tiny.config(), path, seed=0)
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.array(name) for name in checkpoint.tensors}


def test_a_whole_checkpoint_passes(arrays: Arrays, tmp_path: Path) -> None:
    write(tmp_path / "x", arrays).check()


def test_missing_tensors_are_listed_and_counted(arrays: Arrays, tmp_path: Path) -> None:
    kept = {name: array for name, array in arrays.items() if ".experts.3." not in name}
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "x", kept).check()
    assert "24 tensors missing (layers.0.ffn.experts.3.w1.weight, layers.0.ffn.experts.3.w1.scale, " in str(
        error.value
    )
    assert " and 19 more); check that config.json and the weights belong together" in str(error.value)


def test_unexpected_tensors_are_named(arrays: Arrays, tmp_path: Path) -> None:
    extra = {**arrays, "layers.0.attn.extra.weight": np.zeros(3, np.float32)}
    with pytest.raises(
        CheckpointError, match=r"x: 1 tensor unexpected \(layers\.0\.attn\.extra\.weight\); check"
    ):
        write(tmp_path / "x", extra).check()


def test_missing_and_unexpected_come_together(arrays: Arrays, tmp_path: Path) -> None:
    renamed = {
        name.replace("layers.3.attn.wkv.", "layers.3.attn.wkw."): array for name, array in arrays.items()
    }
    with pytest.raises(CheckpointError, match=r"2 tensors missing \(.*\) and 2 tensors unexpected \("):
        write(tmp_path / "x", renamed).check()


def test_a_scale_of_the_wrong_shape_says_what_it_should_cover(arrays: Arrays, tmp_path: Path) -> None:
    name = "layers.1.attn.wq_b.scale"
    with pytest.raises(CheckpointError) as error:
        write(tmp_path / "x", {**arrays, name: arrays[name][:1]}).check()
    assert str(error.value).endswith(
        f"{name} has shape [1, 1], which does not cover its weight [256, 128] in blocks of 128x128; "
        "expected [2, 1], so convert or download the checkpoint again."
    )


def test_an_fp4_scale_of_the_wrong_shape_says_so_too(arrays: Arrays, tmp_path: Path) -> None:
    name = "layers.1.ffn.experts.2.w2.scale"
    with pytest.raises(
        CheckpointError, match=r"its weight \[128, 64\] packed bytes in blocks of 1x32; expected \[128, 4\]"
    ):
        write(tmp_path / "x", {**arrays, name: arrays[name][:, :2].copy()}).check()


def test_a_weight_of_the_wrong_shape_is_named(arrays: Arrays, tmp_path: Path) -> None:
    name = "layers.2.attn.compressor.ape"
    with pytest.raises(
        CheckpointError, match=rf"{name} has shape \[4, 128\], expected \[128, 128\]; check that config"
    ):
        write(tmp_path / "x", {**arrays, name: arrays[name][:4]}).check()


def test_a_weight_of_the_wrong_dtype_is_named(arrays: Arrays, tmp_path: Path) -> None:
    name = "layers.2.attn.wkv.weight"
    wrong = {**arrays, name: arrays[name].astype(ml_dtypes.bfloat16)}
    with pytest.raises(
        CheckpointError, match=rf"{name} has dtype BF16, expected F8_E4M3; a checkpoint stores all"
    ):
        write(tmp_path / "x", wrong).check()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float_tensors_may_have_any_float_type(arrays: Arrays, tmp_path: Path, dtype: np.dtype) -> None:
    names = ("embed.weight", "layers.0.hc_attn_fn", "layers.0.attn_norm.weight")
    write(tmp_path / "x", {**arrays, **{name: arrays[name].astype(dtype) for name in names}}).check()


def test_mtp_tensors_may_be_absent_or_left_over(arrays: Arrays, tmp_path: Path) -> None:
    write(tmp_path / "absent", {name: array for name, array in arrays.items() if name[:4] != "mtp."}).check()
    raw = {**tiny.RAW, "num_nextn_predict_layers": 0, "compress_ratios": tiny.RAW["compress_ratios"][:4]}
    write(tmp_path / "left", arrays, json.dumps(raw)).check()


def test_config_of_another_model_is_seen(arrays: Arrays, tmp_path: Path) -> None:
    deeper = {**tiny.RAW, "num_hidden_layers": 5, "compress_ratios": [0, 4, 128, 4, 4, 0]}
    with pytest.raises(CheckpointError, match=r"\d+ tensors missing \(layers\.4\."):
        write(tmp_path / "x", arrays, json.dumps(deeper)).check()


def test_packed_checkpoints_are_checked_too(tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "x", seed=0, weights=UNQUANTISED)
    pack(tmp_path / "x", tmp_path / "packed")
    checkpoint = Checkpoint.open(tmp_path / "packed")
    checkpoint.check()
    arrays = {name: checkpoint.array(name) for name in checkpoint.tensors}
    name = "layers.0.ffn.experts.w1.weight"
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[3, 128, 128\], expected \[4, 128, 128\]"):
        write(
            tmp_path / "y", {**arrays, name: arrays[name][:3]}, (tmp_path / "packed/config.json").read_text()
        ).check()
