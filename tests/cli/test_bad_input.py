"""Each broken input ends in one sentence and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from v4graph.checkpoint.init import init
from v4graph.config import ModelConfig

Cli = Callable[..., Result]


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must fail as the issue of a bad input should; return its sentence."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = cli(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("Error: ")
        assert result.stderr.endswith(".\n")
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return result.stderr

    return run


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "broken"))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the JSON header of a safetensors file in place; the data stays where it is."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


@pytest.mark.parametrize("command", ["export", "build", "pack", "init"])
def test_no_such_directory(refused: Callable[..., str], tmp_path: Path, command: str) -> None:
    missing = tmp_path / "missing"
    assert str(missing) in refused(command, missing, tmp_path / "out")


@pytest.mark.parametrize("command", ["run", "eval", "inspect"])
def test_no_such_directory_to_open(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path, command: str
) -> None:
    options = {"run": ("--prompt", "x"), "eval": ("--text", checkpoint / "config.json"), "inspect": ()}
    assert str(tmp_path / "missing") in refused(command, tmp_path / "missing", *options[command])


@pytest.mark.parametrize("command", ["run", "eval"])
def test_no_such_checkpoint(refused: Callable[..., str], engine: Path, tmp_path: Path, command: str) -> None:
    option = ("--prompt", "x") if command == "run" else ("--text", engine / "config.json")
    assert "missing" in refused(command, engine, "--checkpoint", tmp_path / "missing", *option)


@pytest.mark.parametrize("keep", [0.5, 0.0005, 0])
def test_truncated_safetensors(
    refused: Callable[..., str], broken: Path, tmp_path: Path, keep: float
) -> None:
    [file] = broken.glob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    assert file.name in refused("export", broken, tmp_path / "graph")


def test_a_missing_shard(refused: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    init(ModelConfig.load(checkpoint).shrink(1, 2), folder, 0, shard_bytes=1_000_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    assert shards[1].name in refused("export", folder, tmp_path / "graph")


def test_a_scale_of_the_wrong_shape(refused: Callable[..., str], broken: Path, tmp_path: Path) -> None:
    name = "layers.0.attn.wq_b.scale"

    def transpose(header: dict[str, Any]) -> None:
        assert len(set(header[name]["shape"])) > 1
        header[name]["shape"].reverse()

    edit_header(next(broken.glob("*.safetensors")), transpose)
    assert name in refused("export", broken, tmp_path / "graph")


def test_an_unknown_config_key(refused: Callable[..., str], cli: Cli, broken: Path, tmp_path: Path) -> None:
    edit_config(broken, hc_multi=4)
    sentence = refused("export", broken, tmp_path / "graph")
    assert "'hc_multi'" in sentence
    assert "did you mean 'hc_mult'" in sentence
    assert "--allow-unknown-config-keys" in sentence
    goes_on = cli("export", broken, tmp_path / "graph", "--dry-run", "--allow-unknown-config-keys")
    assert goes_on.exit_code == 0


def test_an_unknown_compress_ratio(refused: Callable[..., str], broken: Path, tmp_path: Path) -> None:
    edit_config(broken, compress_ratios=[0, 128, 5])
    sentence = refused("export", broken, tmp_path / "graph")
    assert "compress_ratios" in sentence
    assert "5" in sentence


def test_more_hash_layers_than_layers(refused: Callable[..., str], broken: Path, tmp_path: Path) -> None:
    edit_config(broken, num_hash_layers=9)
    sentence = refused("export", broken, tmp_path / "graph")
    assert "num_hash_layers" in sentence
    assert "9" in sentence


def test_a_prompt_longer_than_max_seq_len(
    refused: Callable[..., str], engine: Path, checkpoint: Path
) -> None:
    sentence = refused("run", engine, "--checkpoint", checkpoint, "--prompt", "beginning " * 200)
    assert "the engine holds 128" in sentence
    assert "--max-seq-len" in sentence


def test_a_state_too_small_for_the_new_tokens(
    refused: Callable[..., str], engine: Path, checkpoint: Path
) -> None:
    command = ("run", engine, "--checkpoint", checkpoint, "--prompt", "And", "--max-new-tokens", 500)
    sentence = refused(*command)
    assert "lower max_new_tokens (--max-new-tokens)" in sentence
    assert "--max-seq-len" in sentence


def test_an_engine_opened_with_another_models_checkpoint(
    refused: Callable[..., str], cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert cli("init", checkpoint, other, "--experts", 4).exit_code == 0
    sentence = refused("run", engine, "--checkpoint", other, "--prompt", "And")
    assert str(other) in sentence
    assert "n_routed_experts" in sentence


def test_v4_numerics_on_an_unquantised_checkpoint(
    refused: Callable[..., str], cli: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "bf16"
    assert cli("init", checkpoint, other, "--layers", 1, "--experts", 2, "--unquantised").exit_code == 0
    assert "v4graph pack" in refused("export", other, tmp_path / "graph", "--numerics", "v4")


@pytest.mark.parametrize("command", ["export", "build", "pack", "init"])
def test_an_output_directory_in_use(
    refused: Callable[..., str], graph: Path, checkpoint: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert str(out) in refused(command, graph if command == "build" else checkpoint, out)


def test_more_layers_than_the_model_has(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    for command in (("export", checkpoint), ("init", checkpoint)):
        assert "99" in refused(*command, tmp_path / "out", "--layers", 99)


def test_a_bf16_graph_has_no_ort_engine(
    refused: Callable[..., str], cli: Cli, checkpoint: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "graph"
    result = cli("export", checkpoint, graph, "--dtype", "bf16", "--layers", 1)
    assert result.exit_code == 0, result.output
    assert "--dtype fp32" in refused("build", graph, tmp_path / "engine")


def test_a_checkpoint_without_weights_cannot_embed_them(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "--embed-weights" in refused("export", "flash", tmp_path / "graph", "--embed-weights")


def test_a_changed_graph_is_not_built(refused: Callable[..., str], graph: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(graph, tmp_path / "graph"))
    with (changed / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "model.onnx" in refused("build", changed, tmp_path / "engine")


def test_a_text_file_that_cannot_be_read(cli: Cli, engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9")
    for path, reason in ((tmp_path / "missing.txt", "No such file"), (file, "not UTF-8")):
        result = cli("eval", engine, "--text", path)
        assert result.exit_code == 2
        assert reason in result.stderr
