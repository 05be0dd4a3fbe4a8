import dataclasses
import os
from pathlib import Path

import pytest
from toy_engine import write_graph

from v4graph.errors import EngineError, ManifestError
from v4graph.manifest import Manifest
from v4graph_runtime import build_engine
from v4graph_runtime.engine import sha256


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "graph")


def test_an_engine_holds_the_graph_and_a_manifest(graph: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "engine"
    manifest = build_engine(graph, target)
    assert manifest == Manifest.load(target, kind="engine")
    assert manifest.backend == "ort"
    assert manifest.files == Manifest.load(graph).files
    assert "onnxruntime" in manifest.tools
    assert sorted(os.listdir(target)) == ["config.json", "manifest.json", "model.onnx"]
    assert sorted(os.listdir(target.parent)) == ["engine"]


def test_an_empty_folder_may_be_built_into(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    build_engine(graph, tmp_path / "engine")
    assert (tmp_path / "engine" / "model.onnx").is_file()


def test_embedded_weights_are_copied_since_onnx_refuses_hard_links(graph: Path, tmp_path: Path) -> None:
    (graph / "weights.safetensors").write_bytes(b"weights")
    build_engine(graph, tmp_path / "engine")
    copied = tmp_path / "engine" / "weights.safetensors"
    assert copied.read_bytes() == b"weights"
    assert copied.stat().st_nlink == 1


def test_links_become_copies_across_file_systems(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (graph / "weights.safetensors").write_bytes(b"0" * 100)
    build_engine(graph, tmp_path / "engine")
    assert (tmp_path / "engine" / "weights.safetensors").read_bytes() == b"0" * 100


def test_a_folder_in_use_is_refused(graph: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(EngineError, match="exists and is not empty"):
        build_engine(graph, target)
    assert os.listdir(target) == ["mine"]
    with pytest.raises(EngineError, match="exists and is not empty"):
        build_engine(graph, graph / "model.onnx")


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="not a graph or engine directory"):
        build_engine(tmp_path, tmp_path / "engine")
    assert os.listdir(tmp_path) == []


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", dtype="bfloat16")
    with pytest.raises(EngineError, match=r"no CPU kernels; export with --dtype fp32\."):
        build_engine(graph, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["graph"]


def test_a_changed_graph_is_refused(graph: Path, tmp_path: Path) -> None:
    (graph / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(EngineError, match=r"model\.onnx was changed"):
        build_engine(graph, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["graph"]


def test_a_graph_that_onnxruntime_cannot_load_leaves_nothing(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph")
    (graph / "model.onnx").write_bytes(b"not onnx")
    manifest = Manifest.load(graph)
    files = {**manifest.files, "model.onnx": sha256(graph / "model.onnx")}
    dataclasses.replace(manifest, files=files).save(graph)
    with pytest.raises(EngineError, match=r"onnxruntime \S+ cannot load it: "):
        build_engine(graph, tmp_path / "engine")
    assert os.listdir(tmp_path) == ["graph"]
