"""Which TensorRT is taken, and why; what is said where none can be."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from v4graph import trt
from v4graph.errors import EngineError
from v4graph.gpu import Gpu


def pretend(
    monkeypatch: pytest.MonkeyPatch, *packages: str, version: str = "11.4.0", gpu: bool = False
) -> None:
    monkeypatch.setattr(trt, "installed", lambda package: package in packages)
    monkeypatch.setattr(trt, "gpus", lambda: (Gpu("H200", "sm90", 1),) if gpu else ())
    module = SimpleNamespace(__version__=version)
    monkeypatch.setattr(trt.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(trt, "name_rtx_library", lambda: None)


def test_the_installed_rtx_is_loaded_and_says_why() -> None:
    loaded = trt.load("rtx")
    assert loaded.rtx
    assert str(loaded).startswith("TensorRT for RTX 1.")
    assert str(loaded).endswith("(as asked)")
    assert trt.cuda_version("tensorrt_rtx") == "13"


@pytest.mark.parametrize(
    ("packages", "gpu", "package", "reason"),
    [
        (("tensorrt",), False, "tensorrt", "the only one installed"),
        (("tensorrt", "tensorrt_rtx"), True, "tensorrt", "both are installed, and there is a GPU"),
        (("tensorrt", "tensorrt_rtx"), False, "tensorrt_rtx", "full TensorRT cannot build without a GPU"),
    ],
)
def test_auto_takes_full_tensorrt_only_where_it_can_build(
    monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], gpu: bool, package: str, reason: str
) -> None:
    pretend(monkeypatch, *packages, gpu=gpu)
    loaded = trt.load()
    assert loaded.package == package
    assert loaded.reason.endswith(reason)


def test_none_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(EngineError, match=r"no TensorRT is installed; `pip install 'v4graph\[rtx\]'` brings"):
        trt.load()
    with pytest.raises(
        EngineError, match=r"^TensorRT is not installed; install it with `pip install 'v4graph\[trt\]'`"
    ):
        trt.load("full")


@pytest.mark.parametrize(("package", "choice"), [("tensorrt", "full"), ("tensorrt_rtx", "rtx")])
def test_too_old(monkeypatch: pytest.MonkeyPatch, package: str, choice: trt.Choice) -> None:
    pretend(monkeypatch, package, version="1.6.9")
    with pytest.raises(
        EngineError, match=r"1\.6\.9 is installed, v4graph needs 1.* or later; upgrade it with"
    ):
        trt.load(choice)


def test_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "tensorrt")

    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(trt.importlib, "import_module", broken)
    with pytest.raises(EngineError, match=r"TensorRT is installed but does not load \(libnvinfer\.so\.11"):
        trt.load()


NAMED = """
import ctypes
from v4graph import trt
trt.load("rtx")
assert ctypes.CDLL("libtensorrt_rtx.so").getPluginRegistry
"""


def test_the_rtx_library_answers_to_the_name_its_parser_opens() -> None:
    subprocess.run([sys.executable, "-c", NAMED], check=True)


UNNAMED = """
import ctypes
from v4graph import trt
trt.name_rtx_library = lambda: None
trt.load("rtx")
try:
    ctypes.CDLL("libtensorrt_rtx.so")
except OSError:
    raise SystemExit(7)
"""


def test_without_that_the_name_is_unknown() -> None:
    assert subprocess.run([sys.executable, "-c", UNNAMED], check=False).returncode == 7


def test_an_alias_library_finds_the_symbols_of_the_real_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "alias.so"
    path.write_bytes(trt._alias_library("libother.so", "libm.so.6"))
    assert ctypes.CDLL(str(path)).cos


@pytest.mark.parametrize(
    ("text", "parts"), [("1.7.1.116", (1, 7, 1, 116)), ("11.0rc1", (11, 0)), ("dev", ())]
)
def test_versions_are_numbers(text: str, parts: tuple[int, ...]) -> None:
    assert trt.version_tuple(text) == parts
