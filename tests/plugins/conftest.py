"""Nano's graphs, exported once per run, and TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest
from graphs import export_nano

from v4graph.trt import TensorRT, load


@pytest.fixture(scope="session")
def tensorrt() -> TensorRT:
    return load("rtx")


@pytest.fixture(scope="session")
def nano_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As traced, so that every op has a node of its own."""
    return export_nano(tmp_path_factory.mktemp("nano") / "graph", optimize=False)


@pytest.fixture(scope="session")
def nano_optimized_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_nano(tmp_path_factory.mktemp("nano-optimized") / "graph")


@pytest.fixture(scope="session")
def nano_exact_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano-exact") / "graph"
    return export_nano(folder, numerics="exact", dtype="float32", optimize=False)


@pytest.fixture(scope="session")
def nano_embedded_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano-embedded") / "graph"
    return export_nano(folder, embed_weights=True, optimize=False)
