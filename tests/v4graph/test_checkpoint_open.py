"""Opening a checkpoint: lazy, through symlinks, in every spelling; what is damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.checkpoint.names import LEAVES, official_name, split_expert
from v4graph.config import OFFICIAL, UNQUANTISED, WeightFormat
from v4graph.errors import CheckpointError, ConfigError
from v4graph.inventory import inventory

EXPERT = "layers.0.ffn.experts.0.w1"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("official") / "tiny"
    init(tiny.config(), path, seed=1)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded") / "tiny"
    init(tiny.config(), path, seed=1, shard_bytes=400_000)
    return path


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "copy"))


def rewrite_header(path: Path, change: Any) -> None:
    """Apply `change` to the parsed header and write the file again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_arrays_are_read_only_views_with_their_own_types(official: Path) -> None:
    checkpoint = Checkpoint.open(official)
    types = {
        "layers.0.attn.wq_a.weight": ml_dtypes.float8_e4m3fn,
        "layers.0.attn.wq_a.scale": ml_dtypes.float8_e8m0fnu,
        f"{EXPERT}.weight": np.int8,
        f"{EXPERT}.scale": ml_dtypes.float8_e8m0fnu,
        "embed.weight": ml_dtypes.bfloat16,
        "layers.0.hc_attn_fn": np.float32,
        "layers.0.ffn.gate.tid2eid": np.int64,
    }
    for name, dtype in types.items():
        array = checkpoint.array(name)
        assert array.dtype == dtype and array.base is not None
        assert not array.flags.writeable and array.flags.aligned and array.flags.c_contiguous
        assert np.shares_memory(array, checkpoint.array(name))


def test_opening_maps_no_data(official: Path) -> None:
    checkpoint = Checkpoint.open(official)
    checkpoint.check()
    files = {slot.file for slot in checkpoint.tensors._slots.values()}
    assert all(file._map is None for file in files)


def test_one_file_shards_and_a_single_path_hold_the_same(official: Path, sharded: Path) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole = Checkpoint.open(official)
    for other in (Checkpoint.open(sharded), Checkpoint.open(official / SINGLE)):
        other.check()
        assert other.config == whole.config and other.weights == whole.weights == OFFICIAL
        assert sorted(other.tensors) == sorted(whole.tensors)
        assert other.fingerprint(data=True) == whole.fingerprint(data=True)


def test_a_cache_of_symlinks_opens(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for file in sharded.iterdir():
        (snapshot / file.name).symlink_to(file)
    checkpoint = Checkpoint.open(snapshot)
    checkpoint.check()
    assert checkpoint.tensors.location("embed.weight")[0].parent == sharded.resolve()


def test_safetensors_library_reads_what_is_written(official: Path) -> None:
    from safetensors import safe_open

    with safe_open(official / SINGLE, framework="np") as file:
        assert sorted(file.keys()) == sorted(tensor.name for tensor in inventory(tiny.config()))
        np.testing.assert_array_equal(
            file.get_tensor("layers.0.hc_attn_fn"), Checkpoint.open(official).array("layers.0.hc_attn_fn")
        )


def test_location_is_the_bytes_of_the_tensor(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    for name in ("head.weight", f"{EXPERT}.weight"):
        path, offset, size = checkpoint.tensors.location(name)
        assert path.read_bytes()[offset : offset + size] == checkpoint.array(name).tobytes()


def test_fingerprints_see_shapes_and_bytes(official: Path, tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "other", seed=2)
    first, other = Checkpoint.open(official), Checkpoint.open(tmp_path / "other")
    assert first.fingerprint() == other.fingerprint()
    assert first.fingerprint(data=True) != other.fingerprint(data=True)


@pytest.mark.parametrize(
    "weights",
    [OFFICIAL, UNQUANTISED, WeightFormat("fp8", "float32", "fp8"), WeightFormat("fp8", "float32", "fp4")],
)
def test_the_format_is_seen_from_the_tensors(weights: WeightFormat, tmp_path: Path) -> None:
    init(tiny.config(), tmp_path / "x", seed=0, weights=weights)
    (tmp_path / "x" / "config.json").write_text(json.dumps({**tiny.RAW, "expert_dtype": None}))
    checkpoint = Checkpoint.open(tmp_path / "x")
    checkpoint.check()
    assert checkpoint.weights == weights and not checkpoint.packed


def test_one_matrix_in_float32_is_seen(official: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(official)
    assert source.weights.plain == "bfloat16"
    arrays = {name: source.array(name) for name in source.tensors}
    gate = "layers.2.ffn.gate.weight"
    for name, plain in (
        (gate, "float32"),
        ("layers.2.attn_norm.weight", "bfloat16"),
        ("mtp.0.head.weight", "bfloat16"),
    ):
        wide = {name: arrays.get(name, arrays["head.weight"]).astype(np.float32)}
        assert tiny.write(tmp_path / name, {**arrays, **wide}).weights.plain == plain


def test_every_spelling_becomes_official() -> None:
    assert official_name("layers.3.attn.wq_a.weight") == "layers.3.attn.wq_a.weight"
    assert official_name("model.layers.3.attn.norm.weight") == "layers.3.attn.kv_norm.weight"
    assert official_name("model.layers.3.ffn.experts.7.w2.weight") == "layers.3.ffn.experts.7.w2.weight"
    assert official_name("model.embed_tokens.weight") == "embed.weight"
    assert official_name("lm_head.weight") == official_name("head.weight") == "head.weight"
    assert official_name("model.hc_head.hc_fn") == "hc_head_fn"
    assert official_name("model.norm.weight") == "norm.weight"
    assert official_name("mtp.0.e_proj.scale") == "mtp.0.e_proj.scale"
    assert official_name("model.layers.0.self_attn.compressor.indexer.scorer.weights_proj.weight") == (
        "layers.0.attn.indexer.weights_proj.weight"
    )
    assert not set(LEAVES) & set(LEAVES.values())


def test_expert_names_split_into_stack_and_number() -> None:
    assert split_expert("layers.1.ffn.experts.12.w3.scale") == ("layers.1.ffn.experts.w3.scale", 12)
    assert split_expert("layers.1.ffn.shared_experts.w3.scale") is None


def test_nothing_there_is_one_clear_sentence(tmp_path: Path, official: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file here"):
        Checkpoint.open(tmp_path)
    shutil.copy(official / SINGLE, tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; copy the model's config\.json"):
        Checkpoint.open(tmp_path)


def test_an_unknown_config_key_is_an_error_unless_allowed(official: Path, tmp_path: Path) -> None:
    path = copy(official, tmp_path)
    (path / "config.json").write_text(json.dumps({**tiny.RAW, "new_feature": 1}))
    with pytest.raises(ConfigError, match="unknown key 'new_feature'"):
        Checkpoint.open(path)
    Checkpoint.open(path, allow_unknown_config_keys=True).check()


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    path = copy(sharded, tmp_path)
    shards = sorted(path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"shard {shards[1].name} is missing, {INDEX} names it"):
        Checkpoint.open(path)
    shards[1].symlink_to(path / "gone")
    shards[2].unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shards[1].name} \(and 1 more\) is missing"):
        Checkpoint.open(path)


def test_shards_without_index_are_refused(sharded: Path, tmp_path: Path) -> None:
    path = copy(sharded, tmp_path)
    (path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"\.safetensors files but no {INDEX}; copy the index too"):
        Checkpoint.open(path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}'])
def test_a_damaged_index_is_named(sharded: Path, tmp_path: Path, text: str) -> None:
    path = copy(sharded, tmp_path)
    (path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: not a valid index \(no weight_map\)"):
        Checkpoint.open(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(official: Path, tmp_path: Path, keep: float) -> None:
    path = copy(official, tmp_path)
    data = (path / SINGLE).read_bytes()
    kept = int(len(data) * keep) if isinstance(keep, float) else keep
    (path / SINGLE).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=rf"{SINGLE}: truncated.*download or copy the file again"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: b"{nonsense", "header is not valid JSON"),
        (lambda header: b"\xff\xfe{}", "header is not valid JSON"),
        (lambda header: b"[]", "not valid JSON of tensors"),
        (lambda header: header["head.weight"].pop("shape"), "not valid JSON of tensors"),
        (lambda header: header["head.weight"].update(data_offsets=[0]), "not valid JSON of tensors"),
        (lambda header: header["head.weight"].update(shape="40"), "not valid JSON of tensors"),
        (lambda header: header["head.weight"].update(dtype="F4_E2M1"), "head.weight has dtype F4_E2M1"),
        (lambda header: header["head.weight"].update(shape=[41, 128]), "spans 10240 bytes .* expected 10496"),
        (lambda header: header["head.weight"].update(data_offsets=[-10240, 0]), "head.weight spans"),
    ],
)
def test_a_damaged_header_is_named(official: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = copy(official, tmp_path)
    rewrite_header(path / SINGLE, change)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: .*{message}"):
        Checkpoint.open(path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 3000), value=st.integers(0, 255))
def test_any_flipped_header_byte_is_an_error_or_harmless(
    official: Path, tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("flip") / SINGLE
    shutil.copy(official / "config.json", path.parent)
    data = bytearray((official / SINGLE).read_bytes())
    data[position] = value
    path.write_bytes(data)
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.check()
        for name in checkpoint.tensors:
            checkpoint.array(name)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_two_spellings_of_one_tensor_are_refused(official: Path, tmp_path: Path) -> None:
    path = copy(official, tmp_path)
    rewrite_header(path / SINGLE, lambda header: header.update({"lm_head.weight": header["head.weight"]}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and head\.weight are both head\.weight"):
        Checkpoint.open(path)


def test_an_unknown_tensor_is_answered_with_the_nearest(official: Path) -> None:
    checkpoint = Checkpoint.open(official)
    with pytest.raises(CheckpointError, match=r"no tensor embd\.weight; did you mean 'embed\.weight'"):
        checkpoint.array("embd.weight")
    assert "embd.weight" not in checkpoint.tensors
    assert "layers.0.ffn.experts.4.w1.weight" not in checkpoint.tensors


def test_files_of_the_safetensors_library_open(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {f"x.{i}": rng.standard_normal(i).astype(np.float32) for i in range(5)}
    tensors["scalar"] = np.array(3, np.int64)
    save_file(tensors, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps(tiny.RAW))
    checkpoint = Checkpoint.open(tmp_path)
    for name, expected in load_file(tmp_path / SINGLE).items():
        np.testing.assert_array_equal(checkpoint.array(name), expected)
