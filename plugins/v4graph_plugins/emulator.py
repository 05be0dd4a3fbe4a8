"""Kernels on the CPU: the CUDA sources compiled by g++, one fibre per CUDA thread.

A unit (`kernels/<unit>.cu`) is compiled when its first kernel is launched, once per content of the sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError
from v4graph.launch import Launch

KERNELS = Path(__file__).parent / "kernels"
CACHE = Path.home() / ".cache" / "v4graph" / "emulator"
# Misaligned vector accesses trap, as they do on a GPU.
FLAGS = (
    *("-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Werror"),
)


@dataclass(frozen=True)
class Entry:
    """A kernel of a unit: its number, and a letter per parameter (p address, i int32, f float32)."""

    number: int
    signature: str
    threads: int


class EmulatedUnit:
    """One compiled unit."""

    def __init__(self, name: str, library: Path) -> None:
        self.name = name
        self._library = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self._launch = self._library.v4_emu_launch
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [
            ctypes.c_int,
            *[ctypes.c_uint] * 5,
            ctypes.POINTER(ctypes.c_void_p),
            ctypes.c_ulonglong,
            ctypes.c_int,
        ]
        self.entries = dict(self._list())

    def _list(self) -> list[tuple[str, Entry]]:
        entry = self._library.v4_emu_entry
        entry.restype = ctypes.c_char_p
        found: list[tuple[str, Entry]] = []
        signature, threads = ctypes.c_char_p(), ctypes.c_int()
        while name := entry(len(found), ctypes.byref(signature), ctypes.byref(threads)):
            text = (signature.value or b"").decode()
            found.append((name.decode(), Entry(len(found), text, threads.value)))
        return found

    def run(self, launch: Launch, values: Sequence[Any], seed: int, *, native_e4m3: bool) -> None:
        """Run one launch; `values` are ctypes numbers in the order of the kernel's parameters.

        Raises:
            EngineError: the kernel did what a GPU would not forgive; says what and in which thread.
        """
        entry = self.entries[launch.kernel.partition(".")[2]]
        pointers = (ctypes.c_void_p * max(1, len(values)))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values)
        )
        failure = self._launch(
            entry.number, *launch.grid, launch.block, launch.shared, pointers, seed, int(native_e4m3)
        )
        if failure:
            raise EngineError(failure.decode())


class Emulator:
    """Backend of `KernelLauncher` that runs kernels in host memory.

    `seed` chooses the order in which threads run: 0 first to last, 1 last to first, others at random
    (even multiples of 4 as 0, and so on). `native_e4m3` plays an SM with e4m3 tensor cores.
    """

    capturable = False

    def __init__(
        self, seed: int = 0, *, native_e4m3: bool = True, sources: Path = KERNELS, cache: Path = CACHE
    ) -> None:
        self.seed, self.native_e4m3, self._sources, self._cache = seed, native_e4m3, sources, cache

    def signature(self, kernel: str) -> str:
        """Return the letters of a kernel's parameters.

        Raises:
            EngineError: there is no such kernel.
        """
        return self._entry(kernel).signature

    def run(self, launch: Launch, values: Sequence[Any], stream: int) -> None:
        """Run a launch and wait for it."""
        entry = self._entry(launch.kernel)
        if launch.block != entry.threads:
            raise EngineError(
                f"{launch.kernel}: launched with {launch.block} threads, compiled for {entry.threads}."
            )
        self._unit(launch.kernel).run(launch, values, self.seed, native_e4m3=self.native_e4m3)

    def _unit(self, kernel: str) -> EmulatedUnit:
        return compile_unit(kernel.partition(".")[0], self._sources, self._cache)

    def _entry(self, kernel: str) -> Entry:
        name = kernel.partition(".")[2]
        entries = self._unit(kernel).entries
        if name not in entries:
            raise EngineError(f"{kernel}: no such kernel; the unit has {', '.join(entries)}.")
        return entries[name]


@functools.cache
def compile_unit(name: str, sources: Path = KERNELS, cache: Path = CACHE) -> EmulatedUnit:
    """Compile a unit of a folder for the CPU, or load it from the cache.

    Raises:
        EngineError: g++ is missing or refuses the source (its words are in the detail).
    """
    unit = sources / f"{name}.cu"
    if not unit.is_file():
        known = ", ".join(sorted(path.stem for path in sources.glob("*.cu")))
        raise EngineError(f"{unit.name}: no such unit of kernels; there are {known}.")
    headers = (*sources.glob("*.cuh"), *KERNELS.glob("*.cuh"), *(KERNELS / "emulator").iterdir())
    files = [unit, *sorted(headers)]
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    library = cache / f"{name}-{digest.hexdigest()[:24]}.so"
    if not library.is_file():
        _compile(unit, library)
    return EmulatedUnit(name, library)


def _compile(unit: Path, library: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        raise EngineError("the kernel emulator needs g++ (12 or newer); install it with `apt install g++`.")
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_name(f"{library.name}.{os.getpid()}")
    sources = ["-x", "c++", str(unit), str(KERNELS / "emulator" / "emulator.cpp")]
    command = [compiler, *FLAGS, f"-I{KERNELS}", "-o", str(partial), *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(
            f"{unit.name}: g++ refuses it for the emulator; correct the source.", detail=done.stderr
        )
    partial.replace(library)
