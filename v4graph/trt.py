"""Which TensorRT: full `tensorrt` or TensorRT for RTX, one module for whoever builds or runs plans.

The two have the same Python API but for a few names, which callers ask for with `hasattr`. TensorRT
for RTX builds without a GPU; full TensorRT builds for the GPU in the machine only.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
import re
import struct
import sys
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

from v4graph.errors import EngineError
from v4graph.gpu import gpus

Choice = Literal["auto", "full", "rtx"]
PACKAGES = {"full": "tensorrt", "rtx": "tensorrt_rtx"}
# NVIDIA's wheels of the libraries and bindings come without the package that only renames the bindings.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
OLDEST = {"tensorrt": (10, 16), "tensorrt_rtx": (1, 7)}
_EXTRAS = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}


@dataclass(frozen=True)
class TensorRT:
    """A loaded TensorRT: the Python module, its package name and version, and why it was chosen."""

    module: Any
    package: str
    version: str
    reason: str

    @property
    def rtx(self) -> bool:
        """Whether this is TensorRT for RTX."""
        return self.package == "tensorrt_rtx"

    def __str__(self) -> str:
        return f"{TITLES[self.package]} {self.version} ({self.reason})"


def installed(package: str) -> bool:
    """Return whether a package is there, without importing it."""
    return _module_name(package) is not None


def _module_name(package: str) -> str | None:
    names = _MODULES.get(package, (package,))
    return next((n for n in names if n in sys.modules or importlib.util.find_spec(n) is not None), None)


def load(choice: Choice = "auto") -> TensorRT:
    """Import one TensorRT.

    `auto` takes full TensorRT where it is installed and has a GPU to build for, else TensorRT for RTX.

    Raises:
        EngineError: the one asked for, or any, is not installed, too old, or cannot be loaded.
    """
    package, reason = _choose(choice)
    try:
        module = importlib.import_module(_module_name(package) or package)
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{TITLES[package]} is installed but does not load ({_first_line(error)}); install it again with "
            f"`pip install --force-reinstall 'v4graph[{_EXTRAS[package]}]'`."
        ) from error
    version = str(module.__version__)
    if version_tuple(version) < OLDEST[package]:
        oldest = ".".join(str(part) for part in OLDEST[package])
        raise EngineError(
            f"{TITLES[package]} {version} is installed, v4graph needs {oldest} or later; upgrade it with "
            f"`pip install --upgrade 'v4graph[{_EXTRAS[package]}]'`."
        )
    if package == "tensorrt_rtx":
        name_rtx_library()
    return TensorRT(module, package, version, reason)


def _choose(choice: Choice) -> tuple[str, str]:
    there = [package for package in PACKAGES.values() if installed(package)]
    if choice != "auto":
        package = PACKAGES[choice]
        if package not in there:
            raise EngineError(
                f"{TITLES[package]} is not installed; install it with "
                f"`pip install 'v4graph[{_EXTRAS[package]}]'`."
            )
        return package, "as asked"
    if not there:
        raise EngineError(
            "no TensorRT is installed; `pip install 'v4graph[rtx]'` brings TensorRT for RTX, which builds "
            "without a GPU, and `pip install 'v4graph[trt]'` full TensorRT."
        )
    if len(there) == 1:
        return there[0], "the only one installed"
    if gpus():
        return "tensorrt", "both are installed, and there is a GPU"
    return "tensorrt_rtx", "both are installed, and full TensorRT cannot build without a GPU"


def cuda_version(package: str) -> str:
    """Return the CUDA major version of an installed TensorRT ("13"), from its wheel's name; "" if unknown."""
    for distribution in importlib.metadata.distributions():
        match = re.match(rf"{package}[-_]cu(\d+)", distribution.name.replace("-", "_"))
        if match:
            return match.group(1)
    return ""


def version_tuple(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: "1.7.1.116" -> (1, 7, 1, 116)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


_SHIMS: list[Any] = []


def name_rtx_library() -> None:
    """Give libtensorrt_rtx.so.1 its other name, which its ONNX parser opens and no wheel ships.

    Without it the parser ends the process at the first plugin node. Inside this process a name is enough:
    a library without code that is called libtensorrt_rtx.so and depends on the real one, so that looking
    up a symbol in the first finds it in the second.

    Raises:
        EngineError: the real library is not loaded, or this is not 64-bit Linux.
    """
    if _SHIMS or sys.platform != "linux":
        return
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(_alias_library("libtensorrt_rtx.so", "libtensorrt_rtx.so.1"))
        file.flush()
        try:
            _SHIMS.append(ctypes.CDLL(file.name, ctypes.RTLD_GLOBAL))
        except OSError as error:
            raise EngineError(
                f"libtensorrt_rtx.so cannot be named for TensorRT's ONNX parser ({error}); make a symbolic "
                "link of that name beside libtensorrt_rtx.so.1."
            ) from error


def _alias_library(name: str, real: str) -> bytes:
    """Return an ELF shared object with the SONAME `name` that only needs the library `real`."""
    machine = {"x86_64": 62, "aarch64": 183}.get(platform.machine())
    if machine is None:
        raise EngineError(f"TensorRT for RTX is not known on {platform.machine()}; use x86_64 or aarch64.")
    strings = b"\0" + name.encode() + b"\0" + real.encode() + b"\0"
    header_size, segment_size, symbol_size = 64, 56, 24
    dynamic_at = header_size + 2 * segment_size
    # DT_SONAME, DT_NEEDED, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_NULL
    symbols_at = dynamic_at + 7 * 16
    strings_at = symbols_at + symbol_size
    tags = ((14, 1), (1, len(name) + 2), (5, strings_at), (6, symbols_at), (10, len(strings)))
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in (*tags, (11, symbol_size), (0, 0)))
    size = strings_at + len(strings)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, header_size, 0, 0, header_size, segment_size, 2, 0, 0, 0
    )
    load = struct.pack("<IIQQQQQQ", 1, 6, 0, 0, 0, size, size, 0x10000)
    where = struct.pack("<IIQQQQQQ", 2, 6, *(dynamic_at,) * 3, *(len(dynamic),) * 2, 8)
    return header + load + where + dynamic + bytes(symbol_size) + strings
