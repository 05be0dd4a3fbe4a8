"""Which onnxruntime: the CPU package or onnxruntime-gpu, and what keeps its CUDA provider from running.

Both packages have the Python module `onnxruntime`, so only one may be installed. Where the CUDA provider
cannot start, onnxruntime goes on with the CPU and says so in its log only; here that is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError
from v4graph.gpu import driver_version, gpus

Provider = Literal["cpu", "cuda"]
MODULE = "onnxruntime"
DISTRIBUTIONS: dict[Provider, str] = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
EXTRAS: dict[Provider, str] = {"cpu": "ort", "cuda": "ort-gpu"}
CUDA_PROVIDER, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
DEVICE = 0
BFLOAT16 = 16  # TensorProto.BFLOAT16
# The first driver of each CUDA major version.
DRIVERS = {12: "525", 13: "580"}
# onnxruntime's severities: its own default, and nothing but what ends the process.
_WARNING, _FATAL = 2, 4


def installed() -> dict[str, str]:
    """Return which onnxruntime packages are installed, with their versions."""
    found = {}
    for name in DISTRIBUTIONS.values():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def both_installed() -> str | None:
    """Return the sentence for two packages in one folder, None if there are not two."""
    found = installed()
    if len(found) < 2:
        return None
    both = " and ".join(f"{name} {version}" for name, version in found.items())
    return (
        f"{both} are both installed and overwrite each other's files; run `pip uninstall {' '.join(found)}`, "
        f"then `pip install 'v4graph[{EXTRAS['cuda']}]'` or `pip install 'v4graph[{EXTRAS['cpu']}]'`."
    )


def load(provider: Provider = "cpu") -> Any:
    """Import onnxruntime for a provider; whether its CUDA libraries load is seen by `open_session`.

    Raises:
        EngineError: not installed, broken, or, for cuda, everything that is missing here, with its fix.
    """
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name not in (None, MODULE):
            raise _broken(str(error), provider) from error
        raise EngineError(
            f"{DISTRIBUTIONS[provider]} is not installed; "
            f"install it with `pip install 'v4graph[{EXTRAS[provider]}]'`."
        ) from error
    except (ImportError, OSError) as error:
        raise _broken(first_line(error), provider) from error
    if not hasattr(module, "InferenceSession"):
        # Uninstalling one of two packages leaves the other's folder with holes.
        raise _broken("files of it are missing", provider)
    if provider == "cuda":
        _check_cuda(module)
    return module


def _broken(why: str, provider: Provider) -> EngineError:
    return EngineError(
        f"onnxruntime is installed but does not load ({why}); run `pip uninstall {MODULE} {MODULE}-gpu`, "
        f"then `pip install 'v4graph[{EXTRAS[provider]}]'`."
    )


def _check_cuda(module: Any) -> None:
    problems = [problem for problem in (_package_problem(module), _gpu_problem(module)) if problem]
    if problems:
        raise EngineError(
            f"onnxruntime cannot run on CUDA here: {'; moreover '.join(problems)}; "
            "or run with --provider cpu."
        )


def _package_problem(module: Any) -> str | None:
    if both := both_installed():
        return both.removesuffix(".")
    if CUDA_PROVIDER in module.get_available_providers():
        return None
    return (
        f"onnxruntime {module.__version__} is the CPU package; run `pip uninstall {MODULE}`, "
        f"then `pip install 'v4graph[{EXTRAS['cuda']}]'`"
    )


def _gpu_problem(module: Any) -> str | None:
    driver = driver_version()
    if driver is None or not gpus():
        return no_gpu()
    # "" in a CPU package, which is a problem of its own.
    needed = re.match(r"\d+", str(getattr(module, "cuda_version", None) or ""))
    if needed and driver < (int(needed.group()), 0):
        return driver_too_old(f"onnxruntime-gpu {module.__version__}", int(needed.group()), driver)
    return None


def no_gpu() -> str:
    """Return the clause for a machine without a GPU that works."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is '{visible}')"
    return f"no NVIDIA GPU with a working driver is found{hidden}; install NVIDIA's driver if there is a GPU"


def driver_too_old(what: str, cuda: int, driver: tuple[int, int]) -> str:
    """Return the clause for a driver that does not run the CUDA version that a package was built for."""
    version = f" {DRIVERS[cuda]} or later" if cuda in DRIVERS else ""
    return (
        f"{what} is built for CUDA {cuda}, the driver runs CUDA {driver[0]}.{driver[1]} at most; "
        f"install NVIDIA's driver{version}"
    )


def open_session(module: Any, model: Path, settings: Any, provider: Provider) -> Any:
    """Open an InferenceSession of a loaded onnxruntime on one provider.

    Raises:
        EngineError: onnxruntime cannot load the graph, or would run it on the CPU where cuda was asked for.
    """
    missing: tuple[str, ...] = ()
    arguments: dict[str, Any] = {"providers": [CPU_PROVIDER]}
    if provider == "cuda":
        missing = _preload(module)
        # tf32 off: it keeps 10 bits of a float32 product, and flips FP8 codes against the CPU.
        cuda = (CUDA_PROVIDER, {"device_id": str(DEVICE), "use_tf32": "0"})
        # No fallback: it would print on stdout and go on with the CPU.
        arguments = {"providers": [cuda, CPU_PROVIDER], "enable_fallback": 0}
    try:
        with _quiet(module, provider):
            session = module.InferenceSession(str(model), settings, **arguments)
    except Exception as error:  # onnxruntime's error classes share no base but Exception
        raise EngineError(
            f"{model}: onnxruntime {module.__version__} cannot load it: {first_line(error)}"
        ) from error
    if provider == "cuda" and CUDA_PROVIDER not in session.get_providers():
        raise EngineError(_fell_back(module, missing))
    return session


def _fell_back(module: Any, missing: tuple[str, ...]) -> str:
    cuda = getattr(module, "cuda_version", None) or "?"
    reason = f"{', '.join(missing)} cannot be loaded" if missing else "it does not say why"
    return (
        f"onnxruntime-gpu {module.__version__} did not start its CUDA provider ({reason}; it needs the "
        f"libraries of CUDA {cuda} and cuDNN 9); `pip install 'onnxruntime-gpu[cuda,cudnn]'` brings them, "
        "or run with --provider cpu."
    )


def _preload(module: Any) -> tuple[str, ...]:
    """Load CUDA's libraries from pip's nvidia packages, where no linker looks; return the missing ones."""
    preload = getattr(module, "preload_dlls", None)
    if preload is None:
        return ()
    said = io.StringIO()
    # It prints what it cannot load, on stdout.
    with contextlib.redirect_stdout(said):
        preload()
    names = re.findall(r"^Failed to load (\S+?):", said.getvalue(), re.MULTILINE)
    return tuple(dict.fromkeys(Path(name).name for name in names))


@contextlib.contextmanager
def _quiet(module: Any, provider: Provider) -> Iterator[None]:
    """Keep onnxruntime's own report of a provider that does not start off stderr; ours follows."""
    if provider == "cpu":
        yield
        return
    module.set_default_logger_severity(_FATAL)
    try:
        yield
    finally:
        module.set_default_logger_severity(_WARNING)


def host_value(module: Any, array: npt.NDArray[Any]) -> Any:
    """Return an OrtValue on a contiguous array's own memory, which the caller keeps alive.

    `array` may be bfloat16, of which onnxruntime takes no arrays as they are: it knows numpy's dtypes only.
    """
    if array.dtype.name == "bfloat16":
        return module.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), BFLOAT16)
    return module.OrtValue.ortvalue_from_numpy(array)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; onnxruntime appends stack frames to some."""
    return next(iter(str(error).splitlines()), type(error).__name__)
