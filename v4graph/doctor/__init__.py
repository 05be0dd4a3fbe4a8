"""What this machine can do: packages, GPUs and driver, backends and targets, and what is in the way.

`examine` works with nothing but v4graph's own requirements: a package is imported only to see whether it
loads, and what fails becomes part of the report.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from dataclasses import dataclass

from v4graph import __version__
from v4graph.doctor.backends import Backend, try_backends
from v4graph.doctor.packages import Package, find_packages, package_problems
from v4graph.gpu import Gpu, driver_version, gpus
from v4graph.ort import both_installed, no_gpu


@dataclass(frozen=True)
class Report:
    """One machine; `problems` are sentences that end with the fix.

    `driver_cuda` is the newest CUDA version that the driver runs ("13.0"), `nvcc` the release of the compiler
    on PATH; both are None without one.
    """

    v4graph: str
    python: str
    platform: str
    gpus: tuple[Gpu, ...]
    driver_cuda: str | None
    nvcc: str | None
    packages: tuple[Package, ...]
    backends: tuple[Backend, ...]
    problems: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether any backend builds or runs here."""
        return any(backend.builds or backend.runs for backend in self.backends)


def examine() -> Report:
    """Look at the packages, the GPUs and the driver of this machine, and try what they can do."""
    driver = driver_version()
    found = find_packages()
    able = try_backends()
    return Report(
        v4graph=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        gpus=gpus(),
        driver_cuda=f"{driver[0]}.{driver[1]}" if driver else None,
        nvcc=_nvcc(),
        packages=found,
        backends=able,
        problems=_problems(found, able),
    )


def _problems(found: tuple[Package, ...], able: tuple[Backend, ...]) -> tuple[str, ...]:
    """Return every problem once: of the machine, of the packages, of each backend."""
    problems = [
        *([] if gpus() else [f"{no_gpu()}."]),
        *package_problems(found),
        *filter(None, [both_installed()]),
        *(problem for backend in able for problem in backend.problems),
    ]
    if not any(backend.version for backend in able):
        problems.append(
            "no backend is installed; `pip install 'v4graph[ort]'` brings onnxruntime, "
            "`pip install 'v4graph[rtx]'` TensorRT for RTX, which builds without a GPU."
        )
    return tuple(dict.fromkeys(problems))


def _nvcc() -> str | None:
    path = shutil.which("nvcc")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release.group(1) if release else None


__all__ = ["Backend", "Package", "Report", "examine"]
