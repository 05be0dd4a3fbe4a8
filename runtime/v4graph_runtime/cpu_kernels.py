"""The native CPU kernels of the custom ops: compile the library, and register it with onnxruntime.

The sources (`native/`) are compiled once per instruction set; the best that the machine has is chosen when a
session opens. Where there is no library, graphs run through their function bodies.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError

SOURCES = Path(__file__).parent / "native"
LIBRARY = SOURCES / "lib" / "libv4graph_cpu.so"
# Another library to load, such as one that was built with sanitizers.
LIBRARY_VARIABLE = "V4GRAPH_CPU_LIBRARY"
# Which instruction set to use; the best one where it is not set.
ISA_VARIABLE = "V4GRAPH_CPU_ISA"

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c")
_WIDE = "-mprefer-vector-width=512"
# Compiler flags of each instruction set of x86-64; other machines have the plain one only.
SETS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (*_AVX512, _WIDE),
    "avx512_bf16": (*_AVX512, "-mavx512vbmi", "-mavx512vnni", "-mavx512bf16", _WIDE),
}
# No fast-math: sums keep their order, so that every schedule gives the same bits.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
    "-Wall",
    "-Wextra",
    # g++ 12 reports the placeholders of its own intrinsics headers.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
)
SANITIZERS = ("-Werror", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

Progress = Callable[[str, int, int], None]


def find_compiler() -> str:
    """Return the path of $CXX or g++.

    Raises:
        EngineError: there is none.
    """
    for name in (os.environ.get("CXX", ""), "g++"):
        if name and (path := shutil.which(name)):
            return path
    raise EngineError(
        "no C++ compiler is found (CXX, g++); install g++ 12 or newer, such as with `apt install g++`; "
        "without it graphs run through their function bodies, only slower."
    )


def build_library(
    compiler: str,
    out: Path = LIBRARY,
    *,
    sanitize: bool = False,
    report: Progress = lambda what, done, total: None,
) -> bool:
    """Compile the library to `out`; return False if it is up to date.

    Raises:
        EngineError: the compiler failed; its first message is in the text.
    """
    flags = FLAGS + (SANITIZERS if sanitize else ())
    state = _digest(compiler, flags)
    stamp = out.with_suffix(".sha256")
    if out.is_file() and stamp.is_file() and stamp.read_text() == state:
        return False
    sets = SETS if platform.machine() in ("x86_64", "AMD64") else {"plain": ()}
    units = [("isa.cpp", name, (f"-DV4_ISA={name}", *extra)) for name, extra in sets.items()]
    units += [("library.cpp", "library", (f'-DV4_SOURCES="{_sources()}"',)), ("pool.cpp", "pool", ())]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        objects = [Path(folder) / f"{name}.o" for _, name, _ in units]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            jobs = [
                pool.submit(_run, [compiler, *flags, *extra, "-c", str(SOURCES / source), "-o", str(path)])
                for (source, _, extra), path in zip(units, objects, strict=True)
            ]
            for done, job in enumerate(jobs):
                report(units[done][1], done, len(units))
                job.result()
        partial = Path(folder) / out.name
        _run([compiler, *flags, "-shared", *map(str, objects), "-o", str(partial)])
        partial.replace(out)
    stamp.write_text(state)
    return True


def _digest(compiler: str, flags: Iterable[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return hashlib.sha256(
        repr((version, tuple(flags), sorted(SETS.items()), _sources())).encode()
    ).hexdigest()


def _sources() -> str:
    state = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        state.update(path.name.encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise EngineError(
            f"{command[0]} failed on {Path(command[-3]).name}: {lines[0] if lines else 'no message'}; "
            "the sources are written for g++ 12 or newer, choose one with CXX."
        )


def library_path() -> Path | None:
    """Return the library that sessions load, None if there is none.

    Raises:
        EngineError: the environment names one that does not exist.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named is None:
        return LIBRARY if LIBRARY.is_file() else None
    if not Path(named).is_file():
        raise EngineError(
            f"{LIBRARY_VARIABLE} is '{named}', which is no file; unset it, or name the library."
        )
    return Path(named)


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library with the types of its functions.

    Raises:
        EngineError: it does not load here, or is out of date.
    """
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(f"{path}: does not load ({error}); run `v4graph kernels build-cpu`.") from error
    # A library of another kind, or of a time before this function, has none.
    compiled_from = getattr(library, "v4graph_cpu_sources", None)
    if compiled_from is not None:
        compiled_from.restype = ctypes.c_char_p
    if compiled_from is None or compiled_from().decode() != _sources():
        raise EngineError(
            f"{path}: was compiled from other sources than this v4graph's; run `v4graph kernels build-cpu`."
        )
    library.v4graph_cpu_configure.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p)
    library.v4graph_cpu_sets.restype = ctypes.c_char_p
    library.v4graph_cpu_ops.restype = ctypes.c_char_p
    library.v4graph_cpu_read.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
    library.v4graph_cpu_read.restype = ctypes.c_uint64
    return library


def instruction_sets(library: ctypes.CDLL) -> tuple[str, ...]:
    """Return the instruction sets that this machine runs, best first."""
    return tuple(library.v4graph_cpu_sets().decode().split())


def register(settings: Any, ops: Iterable[str], threads: int, isa: str | None = None) -> str | None:
    """Add the kernels of `ops` (names as in the graph, tags included) to onnxruntime's SessionOptions.

    Returns:
        The instruction set; None where there is no library and bodies will run.

    Raises:
        EngineError: the library does not load, or the machine lacks the instruction set `isa`.
    """
    path = library_path()
    if path is None:
        return None
    library = open_library(path)
    wanted = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    if library.v4graph_cpu_configure(" ".join(ops).encode(), threads, wanted.encode()):
        raise EngineError(
            f"the CPU kernels have no instruction set '{wanted}' that this machine runs; "
            f"use one of {', '.join(instruction_sets(library))} in {ISA_VARIABLE}."
        )
    settings.register_custom_ops_library(str(path))
    return wanted or instruction_sets(library)[0]
