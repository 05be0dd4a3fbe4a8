"""Importing the core or the runtime, and asking for help, loads no heavy package."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = (
    *("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tensorrt"),
    *("tokenizers", "transformers", "llguidance", "starlette", "uvicorn", "pydantic", "prometheus_client"),
)


def _python(code: str) -> str:
    # The paths of this process, so that a bare checkout works as an installation does.
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "module",
    [
        *("v4graph", "v4graph.cli", "v4graph.source", "v4graph.ops", "v4graph_plugins"),
        *("v4graph_runtime", "v4graph_runtime.chat"),
    ],
)
def test_import_leaves_heavy_packages_out(module: str) -> None:
    loaded = _python(f"import {module}; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_help_is_fast() -> None:
    started = time.perf_counter()
    text = _python("from v4graph.cli import main; main(['--help'], standalone_mode=False)")
    seconds = time.perf_counter() - started
    assert "export" in text
    # Measured 0.15 s; importing torch alone takes more than this bound.
    assert seconds < 1.5
