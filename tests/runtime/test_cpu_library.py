"""Finding, compiling and choosing the CPU kernels' library."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from engines import Built

from v4graph.errors import EngineError
from v4graph_runtime import cpu_kernels
from v4graph_runtime.function_names import function_names


def test_without_a_library_bodies_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cpu_kernels.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(cpu_kernels, "LIBRARY", tmp_path / "none.so")
    assert cpu_kernels.register(onnxruntime.SessionOptions(), [], 1) is None


def test_a_named_library_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_kernels.LIBRARY_VARIABLE, "/nowhere/lib.so")
    with pytest.raises(EngineError, match=r"V4GRAPH_CPU_LIBRARY is '/nowhere/lib.so', which is no file"):
        cpu_kernels.register(onnxruntime.SessionOptions(), [], 1)


def test_a_file_that_is_no_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("no library")
    monkeypatch.setenv(cpu_kernels.LIBRARY_VARIABLE, str(tmp_path / "lib.so"))
    with pytest.raises(EngineError, match=r"lib.so: does not load .*v4graph kernels build-cpu"):
        cpu_kernels.register(onnxruntime.SessionOptions(), [], 1)


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu_kernels.build_library(cpu_kernels.find_compiler())
    monkeypatch.setattr(cpu_kernels, "_sources", lambda: "other")
    with pytest.raises(EngineError, match=r"compiled from other sources .*v4graph kernels build-cpu"):
        cpu_kernels.register(onnxruntime.SessionOptions(), [], 1)


def test_a_library_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import _ctypes

    monkeypatch.setenv(cpu_kernels.LIBRARY_VARIABLE, _ctypes.__file__)
    with pytest.raises(EngineError, match=r"compiled from other sources .*v4graph kernels build-cpu"):
        cpu_kernels.register(onnxruntime.SessionOptions(), [], 1)


def test_an_unknown_instruction_set_is_refused_with_those_that_run_here() -> None:
    cpu_kernels.build_library(cpu_kernels.find_compiler())
    with pytest.raises(EngineError, match=r"no instruction set 'sse9' .* plain in V4GRAPH_CPU_ISA"):
        cpu_kernels.register(onnxruntime.SessionOptions(), [], 1, "sse9")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(EngineError, match=r"failed on isa.cpp: x.cpp:1: error: broken"):
        cpu_kernels.build_library(str(compiler), tmp_path / "out" / "lib.so")
    assert not list((tmp_path / "out").iterdir())


def test_no_compiler_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineError, match=r"no C\+\+ compiler is found .*apt install g\+\+"):
        cpu_kernels.find_compiler()


def test_function_names_are_those_of_the_file(official: Built, tmp_path: Path) -> None:
    import onnx

    path = Path(official.engine) / "model.onnx"
    assert list(function_names(path)) == [f.name for f in onnx.load(path, load_external_data=False).functions]
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff not a model")
    assert function_names(tmp_path / "model.onnx") == ()
