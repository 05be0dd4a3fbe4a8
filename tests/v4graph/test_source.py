"""What a name stands for: a directory, a file, a preset, or a repository of the Hub."""

from __future__ import annotations

import hashlib
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from v4graph.checkpoint.init import init
from v4graph.config import ModelConfig
from v4graph.errors import CheckpointError, ConfigError
from v4graph.source import open_checkpoint, resolve

NANO = Path(__file__).resolve().parents[2] / "models" / "nano"
REPOSITORY = "some-org/some-model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer in several shards, with other files that a repository has."""
    folder = tmp_path_factory.mktemp("model") / "repository"
    init(ModelConfig.load(NANO).shrink(1, 2), folder, 0, shard_bytes=1_000_000)
    for name in ("tokenizer.json", "README.md", "inference/config.json", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


class Hub:
    """Stands for `huggingface_hub.snapshot_download`: a cache of blobs and a snapshot of symlinks."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository = repository
        self.snapshot = cache / "snapshots" / "0123abcd"
        self.blobs = cache / "blobs"
        self.fetched: set[str] = set()

    def __call__(self, repo_id: str, *, allow_patterns: list[str], ignore_patterns: str) -> str:
        if repo_id != REPOSITORY:
            raise LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nSecond line.")
        self.blobs.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.repository.rglob("*")):
            name = str(path.relative_to(self.repository))
            wanted = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if path.is_dir() or not wanted or fnmatch(name, ignore_patterns):
                continue
            self.fetched.add(name)
            blob = self.blobs / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            target = self.snapshot / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(blob)
        return str(self.snapshot)


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(model, tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_directory_with_weights_is_a_checkpoint(model: Path) -> None:
    source = resolve(str(model))
    assert source.checkpoint is not None
    assert source.config == source.checkpoint.config
    assert (source.name, source.path) == (str(model), model)
    source.checkpoint.check()


def test_one_safetensors_file_is_a_checkpoint_with_the_config_beside_it(tmp_path: Path) -> None:
    init(ModelConfig.load(NANO).shrink(1, 2), tmp_path / "one", 0)
    [file] = (tmp_path / "one").glob("*.safetensors")
    source = resolve(str(file))
    assert source.checkpoint is not None
    assert source.path == tmp_path / "one"


def test_a_config_file_and_a_preset_are_a_config_alone(model: Path) -> None:
    for name, layers in ((str(model / "config.json"), 1), ("flash", 43)):
        source = resolve(name)
        assert (source.checkpoint, source.path) == (None, None)
        assert len(source.config.layers) == layers


def test_a_directory_with_only_a_config_keeps_its_tokenizer(model: Path, tmp_path: Path) -> None:
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    source = resolve(str(tmp_path))
    assert (source.checkpoint, source.path) == (None, tmp_path)


def test_an_existing_path_wins_over_a_preset(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash").mkdir()
    shutil.copyfile(model / "config.json", tmp_path / "flash" / "config.json")
    monkeypatch.chdir(tmp_path)
    assert len(resolve("flash").config.layers) == 1


def test_exporting_a_repository_fetches_config_and_tokenizer_only(hub: Hub) -> None:
    source = resolve(REPOSITORY)
    assert hub.fetched == {"config.json", "tokenizer.json"}
    assert (source.checkpoint, source.path) == (None, hub.snapshot)


def test_opening_a_repository_fetches_its_weights_and_follows_the_cache_symlinks(hub: Hub) -> None:
    checkpoint = open_checkpoint(REPOSITORY)
    assert {Path(name).suffix for name in hub.fetched} == {".json", ".safetensors"}
    assert "model.safetensors.index.json" in hub.fetched
    assert not any("/" in name for name in hub.fetched)
    checkpoint.check()


def test_a_repository_fetched_again_with_weights_gains_them(hub: Hub) -> None:
    assert resolve(REPOSITORY).checkpoint is None
    assert resolve(REPOSITORY, weights=True).checkpoint is not None


def test_an_existing_path_is_never_looked_up_on_the_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / REPOSITORY)
    assert resolve(REPOSITORY).checkpoint is not None
    assert hub.fetched == set()


def test_a_repository_that_the_hub_does_not_deliver_is_one_sentence(hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"^models/nanoo: no such directory, and the Hub .*not known\)\.$"):
        resolve("models/nanoo")


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'v4graph\[hub\]'"):
        resolve(REPOSITORY)


@pytest.mark.parametrize("name", ["missing", "a/b/c", "./a/b"])
def test_a_name_of_nothing_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no such file, directory or preset"):
        resolve(name)
    with pytest.raises(CheckpointError, match="no such directory"):
        open_checkpoint(name)


def test_a_config_has_no_weights_to_open(model: Path) -> None:
    with pytest.raises(CheckpointError, match="no weights here"):
        open_checkpoint(str(model / "config.json"))
