"""Which onnxruntime is there, and every reason for which its CUDA provider does not run."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cuda_ort import CPU, install, plain_module

from v4graph import ort
from v4graph.errors import EngineError

MODEL = Path("model.onnx")
CPU_PACKAGE = {"get_available_providers": lambda: [CPU], "cuda_version": "", "__version__": "1.32.0"}
NO_GPU = "no NVIDIA GPU with a working driver is found; install NVIDIA's driver if there is a GPU"


def refusal(provider: ort.Provider = "cuda") -> str:
    with pytest.raises(EngineError) as caught:
        ort.load(provider)
    return str(caught.value)


@pytest.mark.parametrize(("provider", "package"), [("cpu", "onnxruntime"), ("cuda", "onnxruntime-gpu")])
def test_a_missing_package_is_named_with_its_extra(
    provider: ort.Provider, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    extra = {"cpu": "ort", "cuda": "ort-gpu"}[provider]
    install_it = f"install it with `pip install 'v4graph[{extra}]'`."
    assert refusal(provider) == f"{package} is not installed; {install_it}"


def test_a_package_with_holes_is_to_be_installed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    assert refusal("cpu") == (
        "onnxruntime is installed but does not load (files of it are missing); "
        "run `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install 'v4graph[ort]'`."
    )


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libfoo.so: no such file\n  stack"),
        ModuleNotFoundError("libfoo.so: no such file", name="capi"),
    ],
)
def test_a_package_that_fails_to_import_says_why(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> Any:
        raise error

    monkeypatch.setattr("importlib.import_module", fail)
    assert "does not load (libfoo.so: no such file); run `pip uninstall" in refusal("cpu")


def test_the_cpu_package_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, plain_module(**CPU_PACKAGE), packages={"onnxruntime": "1.32.0"})
    assert refusal() == (
        "onnxruntime cannot run on CUDA here: onnxruntime 1.32.0 is the CPU package; "
        "run `pip uninstall onnxruntime`, then `pip install 'v4graph[ort-gpu]'`; "
        "or run with --provider cpu."
    )
    assert ort.load("cpu").__version__ == "1.32.0"


def test_two_packages_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    install(monkeypatch, plain_module(), packages=both)
    assert (
        "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed and overwrite each other's files; "
        "run `pip uninstall onnxruntime onnxruntime-gpu`, then `pip install 'v4graph[ort-gpu]'`"
    ) in refusal()


def test_a_machine_without_gpu_says_so_beside_what_else_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install(monkeypatch, plain_module(), gpus=(), driver=None)
    assert refusal() == f"onnxruntime cannot run on CUDA here: {NO_GPU}; or run with --provider cpu."
    install(monkeypatch, plain_module(**CPU_PACKAGE), gpus=(), packages={"onnxruntime": "1.32.0"})
    assert f"`pip install 'v4graph[ort-gpu]'`; moreover {NO_GPU}; or run" in refusal()


def test_hidden_gpus_are_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    install(monkeypatch, plain_module(), gpus=())
    assert "is found (CUDA_VISIBLE_DEVICES is ''); install" in refusal()


def test_a_driver_older_than_the_package_is_to_be_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, plain_module(), driver=(12, 8))
    assert (
        "onnxruntime-gpu 1.31.1 is built for CUDA 13, the driver runs CUDA 12.8 at most; "
        "install NVIDIA's driver 580 or later; or run with --provider cpu."
    ) in refusal()
    install(monkeypatch, plain_module(cuda_version="12.8"), driver=(12, 2))
    assert ort.load("cuda").cuda_version == "12.8"


def test_a_provider_that_does_not_start_is_no_silent_cpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def preload() -> None:
        print("Failed to load /site-packages/nvidia/cu13/lib/libcublas.so.13: cannot open")
        print("Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file")
        print("Failed to load libcurand.so.10: libcurand.so.10: cannot open shared object file")
        print("Please follow https://onnxruntime.ai/docs/install/#cuda-and-cudnn to install CUDA.")

    fell_back = types.SimpleNamespace(get_providers=lambda: [CPU])
    module = plain_module(preload_dlls=preload, InferenceSession=lambda *_args, **_options: fell_back)
    install(monkeypatch, module)
    with pytest.raises(EngineError) as caught:
        ort.open_session(ort.load("cuda"), MODEL, None, "cuda")
    assert str(caught.value) == (
        "onnxruntime-gpu 1.31.1 did not start its CUDA provider (libcublas.so.13, libcurand.so.10 cannot be "
        "loaded; it needs the libraries of CUDA 13.0 and cuDNN 9); "
        "`pip install 'onnxruntime-gpu[cuda,cudnn]'` brings them, or run with --provider cpu."
    )
    assert capfd.readouterr().out == ""


def test_the_log_is_quiet_only_while_a_cuda_session_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    severities: list[int] = []

    def fail(*_args: Any, **_options: Any) -> Any:
        raise RuntimeError("CUDA failure 2: out of memory\n  at some.cc:12")

    module = plain_module(set_default_logger_severity=severities.append, InferenceSession=fail)
    install(monkeypatch, module)
    with pytest.raises(EngineError, match=r"1\.31\.1 cannot load it: CUDA failure 2: out of memory$"):
        ort.open_session(module, MODEL, None, "cuda")
    assert severities == [4, 2]
    with pytest.raises(EngineError):
        ort.open_session(module, MODEL, None, "cpu")
    assert severities == [4, 2]


def test_cuda_computes_in_full_float32_and_without_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def open_it(*_args: Any, **arguments: Any) -> Any:
        seen.update(arguments)
        return types.SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", CPU])

    module = plain_module(InferenceSession=open_it)
    ort.open_session(module, MODEL, None, "cuda")
    assert seen["providers"] == [("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"}), CPU]
    assert seen["enable_fallback"] == 0


def test_an_older_onnxruntime_without_preload_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = plain_module()
    del module.preload_dlls
    assert ort.open_session(module, MODEL, None, "cuda").get_providers()
