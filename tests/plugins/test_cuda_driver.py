"""Launches through the CUDA driver, which is played here: what it is asked, and what its refusals become."""

from __future__ import annotations

import enum
import importlib
import json
import sys
from ctypes import c_float, c_int32, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from v4graph.errors import EngineError
from v4graph.launch import Launch
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.host import Host
from v4graph_plugins.kernel_files import KernelFiles
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.reference_launcher import ReferenceLauncher


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209


class Driver:
    """The calls of cuda.bindings.driver that launches need; `context` is current."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.context, self.refused = 5, ""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            if name == self.refused:
                return (CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None)
            if name == "cuCtxGetCurrent":
                return (CUresult.CUDA_SUCCESS, self.context)
            self.calls.append((name, *arguments))
            answers = {"cuModuleLoadData": ("module",), "cuModuleGetFunction": ("function",)}
            return (CUresult.CUDA_SUCCESS, *answers.get(name, ()))

        return call


@pytest.fixture
def files(tmp_path: Path) -> KernelFiles:
    """One unit for sm90 and one for any GPU."""
    targets = {}
    for target, name in (("sm90", "norm.cubin"), ("portable", "norm.ptx")):
        path = tmp_path / target / name
        path.parent.mkdir()
        path.write_bytes(target.encode())
        targets[target] = {"files": {"norm": {"file": f"{target}/{name}"}}}
    kernels = {"norm.v4_rms_norm": {"arguments": "pif", "threads": 128}}
    return KernelFiles(tmp_path, {"format": 1, "ptx_isa": "9.0", "kernels": kernels, "targets": targets})


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver, original = Driver(), importlib.import_module
    monkeypatch.setattr(
        "v4graph_plugins.cuda_driver.importlib.import_module",
        lambda name: driver if name == "cuda.bindings.driver" else original(name),
    )
    return driver


def launch(shared: int = 0, kernel: str = "norm.v4_rms_norm") -> Launch:
    return Launch(kernel, (7, 2, 1), 128, shared, ())


VALUES = (c_void_p(4096), c_int32(3), c_float(0.5))


def test_a_launch_is_the_plans(files: KernelFiles, driver: Driver) -> None:
    backend = CudaDriver(files, "sm90")
    assert backend.capturable
    assert backend.signature("norm.v4_rms_norm") == "pif"
    backend.run(launch(), VALUES, stream=77)
    arguments = ((4096, 3, 0.5), (c_void_p, c_int32, c_float))
    assert driver.calls == [
        ("cuModuleLoadData", b"sm90\0"),
        ("cuModuleGetFunction", "module", b"v4_rms_norm"),
        ("cuLaunchKernel", "function", 7, 2, 1, 128, 1, 1, 0, 77, arguments, 0),
    ]


def test_a_unit_is_loaded_once_per_context(files: KernelFiles, driver: Driver) -> None:
    backend = CudaDriver(files, "sm90")
    for context in (5, 5, 6, 5):
        driver.context = context
        backend.run(launch(), VALUES, stream=0)
    assert [call[0] for call in driver.calls].count("cuModuleLoadData") == 2
    assert [call[0] for call in driver.calls].count("cuLaunchKernel") == 4


def test_much_shared_memory_is_asked_for_when_it_grows(files: KernelFiles, driver: Driver) -> None:
    backend = CudaDriver(files, "sm90")
    for shared in (48 << 10, 64 << 10, 50 << 10, 96 << 10):
        backend.run(launch(shared), VALUES, stream=0)
    asked = [call for call in driver.calls if call[0] == "cuFuncSetAttribute"]
    assert asked == [("cuFuncSetAttribute", "function", 8, size << 10) for size in (64, 96)]


def test_a_refusal_names_the_kernel_the_drivers_word_and_the_target(
    files: KernelFiles, driver: Driver
) -> None:
    driver.refused = "cuModuleLoadData"
    with pytest.raises(EngineError) as found:
        CudaDriver(files, "portable").run(launch(), VALUES, stream=0)
    assert str(found.value) == (
        "kernels 'norm': the CUDA driver answers CUDA_ERROR_NO_BINARY_FOR_GPU to cuModuleLoadData (kernels "
        "for "
        "portable); `v4graph doctor` shows the GPU and its driver, `v4graph kernels build` compiles kernels "
        "for it."
    )


def test_a_kernel_that_the_files_lack_is_named(files: KernelFiles, driver: Driver) -> None:
    with pytest.raises(EngineError, match=r"has no kernel 'norm\.v4_x'; compile them again with"):
        CudaDriver(files, "sm90").signature("norm.v4_x")
    with pytest.raises(EngineError, match=r"has no kernels 'moe' for sm90; compile them with"):
        CudaDriver(files, "sm90").run(launch(kernel="moe.v4_x"), VALUES, stream=0)


def test_without_the_bindings_the_package_is_named(
    files: KernelFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(EngineError, match=r"launching kernels needs cuda-bindings; install it with"):
        CudaDriver(files, "sm90")


def test_the_host_takes_kernels_for_bf16_and_references_for_float32(
    files: KernelFiles, driver: Driver, tmp_path: Path
) -> None:
    (tmp_path / "index.json").write_text(json.dumps(files.index))
    host = Host(tmp_path / "no bundle")
    host.use_launcher("bfloat16", "sm90", tmp_path)
    assert isinstance(host.findings.launcher, KernelLauncher)
    assert host.capturable
    host.use_launcher("float32", "sm90", tmp_path)
    assert isinstance(host.findings.launcher, ReferenceLauncher)
    assert not host.capturable
    host.use_launcher("bfloat16", "sm75", tmp_path)
    assert isinstance(host.findings.launcher, ReferenceLauncher)
