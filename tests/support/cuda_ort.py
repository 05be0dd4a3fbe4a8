"""onnxruntime-gpu played by onnxruntime: "cuda" values are copies in host memory, and the CPU computes."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from v4graph.gpu import Gpu

H200 = Gpu("NVIDIA H200", "sm90", 150_000_000_000)
# Beside it lies the small graph that comes with the package.
_FILE = importlib.import_module("onnxruntime").__file__
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def plain_module(**changes: Any) -> types.ModuleType:
    """Return a module named onnxruntime with the names that `v4graph.ort` asks for."""
    module = types.ModuleType("onnxruntime")
    names: dict[str, Any] = {
        "__file__": _FILE,
        "__version__": "1.31.1",
        "cuda_version": "13.0",
        "InferenceSession": lambda *_args, **_options: types.SimpleNamespace(
            get_providers=lambda: [CUDA, CPU]
        ),
        "get_available_providers": lambda: [CUDA, CPU],
        "SessionOptions": lambda: None,
        "preload_dlls": lambda: None,
        "set_default_logger_severity": lambda _severity: None,
    }
    for name, value in (names | changes).items():
        setattr(module, name, value)
    return module


def install(
    patch: pytest.MonkeyPatch,
    module: Any,
    *,
    gpus: tuple[Gpu, ...] = (H200,),
    driver: tuple[int, int] | None = (13, 0),
    packages: dict[str, str] | None = None,
) -> None:
    """Make `module` the onnxruntime of this process, on a machine with these GPUs and this driver."""
    patch.setitem(sys.modules, "onnxruntime", module)
    patch.setattr("v4graph.ort.gpus", lambda: gpus)
    patch.setattr("v4graph.ort.driver_version", lambda: driver)
    found = {"onnxruntime-gpu": "1.31.1"} if packages is None else packages
    patch.setattr("v4graph.ort.installed", lambda: found)


class Device:
    """What the played device saw: the arrays copied to it and the arguments of the sessions."""

    def __init__(self, *, copies_at_binding: bool) -> None:
        self.copies_at_binding = copies_at_binding
        self.uploads: list[Any] = []
        self.sessions: list[dict[str, Any]] = []
        self.bindings: list[Any] = []


def working_module(*, copies_at_binding: bool = False) -> tuple[types.ModuleType, Device]:
    """Return an onnxruntime-gpu that runs.

    With `copies_at_binding` a state bound as input is copied at that moment, as onnxruntime does where
    its first reader has no CUDA kernel.
    """
    real = importlib.import_module("onnxruntime")
    device = Device(copies_at_binding=copies_at_binding)
    module = plain_module(SessionOptions=real.SessionOptions, OrtValue=_values(real, device))
    module.InferenceSession = _session(real, device)  # type: ignore[attr-defined]
    return module, device


def _values(real: Any, device: Device) -> Any:
    class OrtValue:
        ortvalue_from_numpy_with_onnx_type = real.OrtValue.ortvalue_from_numpy_with_onnx_type

        @staticmethod
        def ortvalue_from_numpy(array: Any, device_type: str = "cpu", device_id: int = 0) -> Any:
            if device_type == "cuda":
                assert device_id == 0
                array = array.copy()
                device.uploads.append(array)
            return real.OrtValue.ortvalue_from_numpy(array)

        @staticmethod
        def ortvalue_from_shape_and_type(shape: Any, kind: Any, device_type: str, device_id: int) -> Any:
            assert (device_type, device_id) == ("cuda", 0)
            return real.OrtValue.ortvalue_from_shape_and_type(shape, kind)

    return OrtValue


def _session(real: Any, device: Device) -> Callable[..., Any]:
    class Binding(real.IOBinding):  # type: ignore[misc]
        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            if device.copies_at_binding and name.startswith("state."):
                value = real.OrtValue.ortvalue_from_numpy(np.array(value.numpy()))
            super().bind_ortvalue_input(name, value)

    class InferenceSession(real.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, settings: Any = None, **arguments: Any) -> None:
            device.sessions.append(arguments)
            super().__init__(path, settings, providers=[CPU])

        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

        def io_binding(self) -> Any:
            device.bindings.append(Binding(self))
            return device.bindings[-1]

    return InferenceSession
