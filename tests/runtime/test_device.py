"""`CudaDevice` on a driver that is played in host memory: what it calls, and what it says of failures."""

import ast
import importlib
import inspect
from typing import Any

import numpy as np
import pytest
from fake_cuda import CUresult, FakeDriver

from v4graph.errors import EngineError
from v4graph.gpu import gpus
from v4graph_runtime import device as device_module
from v4graph_runtime.device import CudaDevice


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(device_module, "_driver", lambda: driver)
    return driver


@pytest.fixture
def device(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    monkeypatch.setattr(device_module, "STAGING_BYTES", 100)
    return CudaDevice(0)


@pytest.mark.parametrize(
    ("nbytes", "copies"), [(0, []), (99, [99]), (100, [100]), (350, [100, 100, 100, 50])]
)
def test_bytes_go_there_and_back_large_ones_in_pieces(
    device: CudaDevice, driver: FakeDriver, nbytes: int, copies: list[int]
) -> None:
    data = np.random.default_rng(0).integers(0, 255, nbytes).astype(np.uint8)
    address = device.allocate(nbytes, "data")
    device.upload(address, data)
    assert driver.copies == copies
    back = np.empty_like(data)
    device.download(back, address)
    device.synchronize()
    np.testing.assert_array_equal(back, data)
    device.zero(address, nbytes)
    device.download(back, address)
    assert not back.any()


def test_a_pinned_buffer_is_filled_only_after_its_last_copy(device: CudaDevice, driver: FakeDriver) -> None:
    address = device.allocate(300, "data")
    device.upload(address, np.zeros(300, np.uint8))
    order = [name for name in driver.calls if name.startswith(("cuEventS", "cuEventR", "cuMemcpy"))]
    assert order == ["cuEventSynchronize", "cuMemcpyHtoDAsync", "cuEventRecord"] * 3
    assert driver.calls.count("cuMemHostAlloc") == 2


def test_full_memory_says_how_much_was_asked_and_is_free(device: CudaDevice, driver: FakeDriver) -> None:
    driver.errors["cuMemAlloc"] = CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(EngineError) as error:
        device.allocate(9_000_000, "weight 'x'")
    assert str(error.value) == (
        "the GPU's memory is full: weight 'x' takes 9,000,000 bytes, 1,234 are free; open the session with a "
        "smaller batch, build the engine with a smaller --max-seq-len, --max-input-len or --max-batch-size, "
        "or end other processes on this GPU (`nvidia-smi` lists them)."
    )


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, "a kernel read or wrote outside its buffers; this process"),
        (CUresult.CUDA_ERROR_UNKNOWN, "see `nvidia-smi` and `v4graph doctor`."),
    ],
)
def test_an_error_is_named_with_its_fix(
    device: CudaDevice, driver: FakeDriver, error: CUresult, fix: str
) -> None:
    driver.errors["cuStreamSynchronize"] = error
    with pytest.raises(EngineError) as raised:
        device.synchronize()
    assert str(raised.value).startswith(f"cuStreamSynchronize failed on the GPU with {error.name}; {fix}")


def test_a_capture_records_work_and_gives_an_executable_graph(device: CudaDevice, driver: FakeDriver) -> None:
    driver.calls.clear()
    graph = device.capture(lambda: driver.calls.append("work"))
    device.launch(graph)
    device.release(graph)
    assert driver.calls == [
        *("cuStreamBeginCapture", "work", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphDestroy"),
        *("cuGraphLaunch", "cuGraphExecDestroy"),
    ]


def test_a_capture_that_fails_is_ended_and_its_own_error_is_told(
    device: CudaDevice, driver: FakeDriver
) -> None:
    driver.calls.clear()

    def work() -> None:
        raise EngineError("TensorRT failed while running the engine.")

    with pytest.raises(EngineError, match="TensorRT failed"):
        device.capture(work)
    assert driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]
    driver.errors["cuStreamEndCapture"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
    with pytest.raises(EngineError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
        device.capture(lambda: None)


def test_closing_frees_everything_even_after_an_error(device: CudaDevice, driver: FakeDriver) -> None:
    device.free(device.allocate(10, "a"))
    device.upload(device.allocate(300, "b"), np.zeros(300, np.uint8))
    assert len(driver.memory) == 3
    driver.errors["cuStreamSynchronize"] = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    device.close()
    assert driver.memory == {}
    assert driver.calls[-2:] == ["cuStreamDestroy", "cuDevicePrimaryCtxRelease"]


def test_every_name_that_is_called_is_in_cuda_bindings() -> None:
    real = importlib.import_module("cuda.bindings.driver")
    tree = ast.parse(inspect.getsource(device_module))
    called = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cu")
    } - {"cuda.bindings.driver", "cuda-bindings"}
    called = {name for name in called if name.isidentifier()}
    called |= {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("cu")
    } - {"cuda"}
    assert len(called) > 15
    assert [name for name in sorted(called) if not hasattr(real, name)] == []
    flags = ("CUstream_flags.CU_STREAM_NON_BLOCKING", "CUevent_flags.CU_EVENT_DISABLE_TIMING")
    for name in (*flags, "CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"):
        kind, _, member = name.partition(".")
        assert hasattr(getattr(real, kind), member)
    assert all(hasattr(real.CUresult, name) for name in device_module._FIXES)


@pytest.mark.skipif(bool(gpus()), reason="this machine has a driver")
def test_without_a_driver_the_fix_is_named() -> None:
    with pytest.raises(EngineError, match=r"no CUDA driver is installed.*; install NVIDIA's driver"):
        CudaDevice()


def test_without_the_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(device_module.importlib, "import_module", missing)
    with pytest.raises(EngineError, match=r"cuda-bindings is not installed; .* 'v4graph\[rtx\]'"):
        CudaDevice()
