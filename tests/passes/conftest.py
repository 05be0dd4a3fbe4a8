"""Nano's graphs as traced, one read from disk and as many fresh models of it as tests want."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from graphs import export_nano

Fresh = Callable[[], ir.Model]


@pytest.fixture(scope="session")
def traced_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V4 numerics in float32."""
    folder = tmp_path_factory.mktemp("traced-nano") / "graph"
    return export_nano(folder, dtype="float32", optimize=False, max_seq_len=128)


@pytest.fixture
def nano_model(traced_nano: Path) -> Fresh:
    return lambda: ir.load(traced_nano / "model.onnx")
