"""Random checkpoints are complete, reproducible, sane in size, and all or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.checkpoint.writer import CheckpointWriter
from v4graph.config import OFFICIAL, UNQUANTISED, WeightFormat
from v4graph.errors import CheckpointError
from v4graph.inventory import Role, StoredTensor, inventory, scale_name, weight_specs
from v4graph.numerics import dequantise_fp4, dequantise_fp8

BASE = WeightFormat("fp8", "float32", "fp8")


def values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    data = checkpoint.array(name)
    if scale_name(name) == name or scale_name(name) not in checkpoint.tensors:
        return data.astype(np.float64)
    decode = dequantise_fp4 if data.dtype == np.int8 else dequantise_fp8
    return decode(data, checkpoint.array(scale_name(name))).astype(np.float64)


@pytest.mark.parametrize("weights", [OFFICIAL, UNQUANTISED, BASE])
def test_every_tensor_is_there_and_matrices_keep_unit_scale(weights: WeightFormat, tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "x", seed=3, weights=weights)
    checkpoint = Checkpoint.open(tmp_path / "x")
    checkpoint.check()
    assert checkpoint.weights == weights == checkpoint.config.weight_format
    assert sorted(checkpoint.tensors) == sorted(tensor.name for tensor in inventory(tiny.config(), weights))
    for spec in weight_specs(tiny.config()):
        data = values(checkpoint, spec.name)
        assert np.isfinite(data).all()
        if spec.role in (Role.LINEAR, Role.EXPERT):
            assert 0.45 < data.std() * spec.shape[1] ** 0.5 < 2.1, spec.name
        elif spec.name.endswith("norm.weight"):
            assert 0.9 < data.mean() < 1.1


def test_hash_tables_pick_distinct_existing_experts(tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "x", seed=3)
    table = np.sort(Checkpoint.open(tmp_path / "x").array("layers.0.ffn.gate.tid2eid"), axis=1)
    assert table.min() >= 0 and table.max() < 4
    assert (table[:, 1:] != table[:, :-1]).all()
    assert len(np.unique(table, axis=0)) > 3


def test_one_seed_gives_one_checkpoint_however_it_is_sharded(tmp_path: Path) -> None:
    for name, seed, shard in (("a", 5, 10**9), ("b", 5, 300_000), ("c", 6, 10**9)):
        init(tiny.config(), tmp_path / name, seed, shard_bytes=shard)
    prints = [Checkpoint.open(tmp_path / name).fingerprint(data=True) for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2


def test_a_tensor_larger_than_a_shard_stands_alone(tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "x", 0, shard_bytes=1)
    Checkpoint.open(tmp_path / "x").check()
    assert len(list((tmp_path / "x").glob("*.safetensors"))) == len(list(inventory(tiny.config())))


def test_the_index_states_every_tensor_and_the_total(tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "x", 0, shard_bytes=300_000)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    expected = list(inventory(tiny.config()))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected)
    assert set(index["weight_map"]) == {tensor.name for tensor in expected}


def test_a_shrunk_preset_has_the_format_that_its_config_leaves_out(tmp_path: Path) -> None:
    raw = {key: value for key, value in tiny.RAW.items() if key != "expert_dtype"}
    init(tiny.config(expert_dtype=None).shrink(2, 3), tmp_path / "x", seed=0)
    checkpoint = Checkpoint.open(tmp_path / "x")
    checkpoint.check()
    assert checkpoint.weights == OFFICIAL and len(checkpoint.config.layers) == 2
    assert checkpoint.config.n_routed_experts == 3 and "expert_dtype" not in raw


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    init(tiny.config(), tmp_path / "x", 0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in inventory(tiny.config()))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_bands_do_not_show_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4graph.checkpoint.init._BAND_ELEMENTS", 1000)
    init(tiny.config(), tmp_path / "x", 0)
    Checkpoint.open(tmp_path / "x").check()


def test_an_existing_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    init(tiny.config(), tmp_path / "x", 0)
    before = Checkpoint.open(tmp_path / "x").fingerprint(data=True)
    with pytest.raises(CheckpointError, match="x: exists already and is not an empty directory"):
        init(tiny.config(), tmp_path / "x", 1)
    assert Checkpoint.open(tmp_path / "x").fingerprint(data=True) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: exists already"):
        init(tiny.config(), tmp_path / "file", 1)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        init(tiny.config(), tmp_path / "x", 0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"x: cannot be written \(.*No space left on device"):
        init(tiny.config(), tmp_path / "x", 0, progress=full)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_target_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        init(tiny.config(), tmp_path / "file" / "x", 0)


def test_a_forgotten_or_wrong_tensor_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    planned = [StoredTensor("a", "F32", (2,))]
    with pytest.raises(ValueError, match="never written: a"), CheckpointWriter(tmp_path / "x", planned):
        pass
    for array, message in (
        (np.zeros(2, np.int8), "int8 written, F32 planned"),
        (np.zeros(3, np.float32), "12 bytes"),
    ):
        with pytest.raises(ValueError, match=message), CheckpointWriter(tmp_path / "x", planned) as writer:
            writer.write("a", array)
    assert not list(tmp_path.iterdir())


def test_sizes_that_do_not_divide_into_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.attn\.wq_b\.weight: 64 inputs cannot be quantised in blocks"
    ):
        init(tiny.config(q_lora_rank=64), tmp_path / "x", 0)
    init(tiny.config(q_lora_rank=64), tmp_path / "x", 0, weights=UNQUANTISED)
    Checkpoint.open(tmp_path / "x").check()


def test_a_negative_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="seed is -1"):
        init(tiny.config(), tmp_path / "x", -1)
