"""Which backends build and run engines here, and for which targets: each is tried as far as it goes."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4graph import ort, trt
from v4graph.errors import EngineError
from v4graph.gpu import driver_version, gpus
from v4graph.targets import PORTABLE, RTX_TARGETS, runs_on

NO_GPU, SEE_BELOW = "no GPU", "see problems"
PLUGIN_GROUP, PLUGIN_NAME = "v4graph.plugins", "tensorrt"


@dataclass(frozen=True)
class Backend:
    """One backend: whether it builds and runs engines here, and TensorRT's for which targets.

    `note` says in a few words why it does not. `problems` are sentences with their fixes, of what is there
    and does not work; that something is not installed, or that there is no GPU, is in `note` only.
    """

    name: str
    version: str | None
    builds: bool
    runs: bool
    build_targets: tuple[str, ...] = ()
    run_targets: tuple[str, ...] = ()
    note: str = ""
    problems: tuple[str, ...] = ()


def try_backends() -> tuple[Backend, ...]:
    """Return every backend of `v4graph build` and `v4graph run`, those that do not work too."""
    return (*_onnxruntime(), _tensorrt("rtx"), _tensorrt("full"))


def _onnxruntime() -> tuple[Backend, Backend]:
    """Return both providers: one engine serves both, so it is built wherever onnxruntime loads."""
    names = ("ort-cpu", "ort-cuda")
    if not ort.installed() and not trt.installed(ort.MODULE):
        cpu, cuda = (f"not installed: pip install 'v4graph[{extra}]'" for extra in ort.EXTRAS.values())
        return _absent(names[0], cpu), _absent(names[1], cuda)
    try:
        version = ort.load().__version__
    except EngineError as error:
        return _absent(names[0], SEE_BELOW, str(error)), _absent(names[1], SEE_BELOW)
    cpu_backend = Backend(names[0], version, builds=True, runs=True)
    if not gpus():
        # The CPU package is the right one then: that it has no CUDA is no problem.
        return cpu_backend, Backend(names[1], version, builds=True, runs=False, note=NO_GPU)
    problem = _cuda_problem()
    if problem:
        return cpu_backend, Backend(names[1], version, True, False, note=SEE_BELOW, problems=(problem,))
    return cpu_backend, Backend(names[1], version, builds=True, runs=True)


def _absent(name: str, note: str, *problems: str) -> Backend:
    return Backend(name, None, builds=False, runs=False, note=note, problems=problems)


def _cuda_problem() -> str | None:
    """Open the small graph that comes with onnxruntime on CUDA: what it lacks is known only then."""
    try:
        module = ort.load("cuda")
        example = Path(module.__file__).parent / "datasets" / "mul_1.onnx"
        if example.is_file():
            ort.open_session(module, example, module.SessionOptions(), "cuda")
    except EngineError as error:
        return str(error)
    return None


def _tensorrt(choice: trt.Choice) -> Backend:
    name = f"trt-{choice}"
    if not trt.installed(trt.PACKAGES[choice]):
        extra = {"rtx": "rtx", "full": "trt"}[choice]
        return _absent(name, f"not installed: pip install 'v4graph[{extra}]'")
    try:
        tensorrt = trt.load(choice)
    except EngineError as error:
        return _absent(name, SEE_BELOW, str(error))
    local = tuple(dict.fromkeys(gpu.target for gpu in gpus()))
    # Full TensorRT builds for the first GPU of the machine.
    able = (PORTABLE, *RTX_TARGETS) if tensorrt.rtx else local[:1]
    if not local:
        note = NO_GPU if tensorrt.rtx else f"{NO_GPU}, without which it does not build either"
        return Backend(name, tensorrt.version, builds=bool(able), runs=False, build_targets=able, note=note)
    running = tuple(
        target for target in able if any(runs_on((target,), gpu, rtx=tensorrt.rtx) for gpu in local)
    )
    if tensorrt.rtx and not running and trt.installed(trt.PACKAGES["full"]):
        note = f"does not run on {', '.join(local)}; trt-full does"
        return Backend(name, tensorrt.version, builds=True, runs=False, build_targets=able, note=note)
    problems = _run_problems(tensorrt, running, local)
    return Backend(
        name,
        tensorrt.version,
        builds=True,
        runs=not problems,
        build_targets=able,
        run_targets=() if problems else running,
        note=SEE_BELOW if problems else "",
        problems=problems,
    )


def _run_problems(
    tensorrt: trt.TensorRT, running: tuple[str, ...], local: tuple[str, ...]
) -> tuple[str, ...]:
    title = f"{trt.TITLES[tensorrt.package]} {tensorrt.version}"
    problems = []
    if not running:
        problems.append(
            f"{title} has no target that runs on {', '.join(local)}; use full TensorRT, "
            "`pip install 'v4graph[trt]'`."
        )
    driver, cuda = driver_version(), trt.cuda_version(tensorrt.package)
    if driver and cuda and driver < (int(cuda), 0):
        problems.append(f"{ort.driver_too_old(title, int(cuda), driver)}.")
    if not _distribution("cuda-bindings"):
        extra = "rtx" if tensorrt.rtx else "trt"
        problems.append(
            "cuda-bindings is not installed, TensorRT engines cannot run without it; "
            f"install it with `pip install 'v4graph[{extra}]'`."
        )
    if problem := _plugin_problem():
        problems.append(f"the plugins of TensorRT engines do not run here: {problem.removesuffix('.')}.")
    return tuple(problems)


def _plugin_problem() -> str | None:
    found = importlib.metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)
    if not found:
        return (
            "v4graph runs from a bare checkout, where nothing names them; "
            "install it with `pip install v4graph`, or with `pip install -e .` in the checkout"
        )
    try:
        host: Any = next(iter(found)).load()()
        present = gpus()
        # Without a GPU: whether what is installed would run on one.
        problem: str | None = host.problem("bfloat16", present[0].target if present else "sm80")
    except Exception as error:  # whatever a plugin package raises on import
        return f"{ort.first_line(error)}; install v4graph again"
    return problem


def _distribution(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
