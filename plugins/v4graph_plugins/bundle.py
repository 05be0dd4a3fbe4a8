"""CUDA sources to the kernel bundle: a cubin per target and unit, PTX for what comes later, and an index.

The same sources and compiler give the same bytes, wherever they lie. A unit whose sources have not changed
is not compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError, near_match
from v4graph.launch import ALL_PLANS
from v4graph.targets import PORTABLE
from v4graph_plugins.catalogue import BUNDLE
from v4graph_plugins.emulator import KERNELS
from v4graph_plugins.kernel_files import FORMAT, INDEX, PLANS_FILE, KernelFiles, sha256

# What nvcc calls a target. From Hopper on, code for one architecture alone ("a").
ARCHITECTURES: Mapping[str, str] = {
    "sm80": "sm_80",
    "sm86": "sm_86",
    "sm89": "sm_89",
    "sm90": "sm_90a",
    "sm100": "sm_100a",
    "sm120": "sm_120a",
    "sm121": "sm_121a",
    PORTABLE: "compute_80",
}
FLAGS = ("-std=c++17", "-O3", "--fmad=true", "-Xptxas", "-v", "-Wno-deprecated-gpu-targets")
OLDEST_NVCC = (13, 0)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Compiler:
    """An nvcc: its path and version."""

    path: str
    version: str


def find_nvcc(cuda_home: str = "") -> Compiler:
    """Return nvcc of `cuda_home`, of PATH, or of /usr/local/cuda.

    Raises:
        EngineError: there is none, or one that is too old.
    """
    places = [Path(cuda_home) / "bin" / "nvcc"] if cuda_home else []
    places += [Path(found)] if (found := shutil.which("nvcc")) else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in places:
        if path.is_file():
            said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            version = re.search(r"V(\d+)\.(\d+)\.(\d+)", said)
            if version is None or (int(version[1]), int(version[2])) < OLDEST_NVCC:
                raise EngineError(
                    f"{path}: nvcc {version[0][1:] if version else '?'}, compiling the kernels needs 13.0 "
                    "or newer; "
                    "install a newer CUDA toolkit, or set CUDA_HOME to one."
                )
            return Compiler(str(path), version[0][1:])
    raise EngineError(
        "compiling the kernels needs nvcc 13.0 or newer, and none was found in CUDA_HOME, PATH or "
        "/usr/local/cuda; "
        "install the CUDA toolkit, or use a wheel of v4graph, which brings the kernels."
    )


@dataclass(frozen=True)
class _Unit:
    """One file to compile for one target."""

    target: str
    name: str
    sources: str  # hash of all that the result depends on

    @property
    def file(self) -> str:
        return f"{self.target}/{self.name}.{'ptx' if self.target == PORTABLE else 'cubin'}"


def build_bundle(
    targets: Iterable[str],
    compiler: Compiler,
    progress: Progress,
    out: Path = BUNDLE,
    sources: Path = KERNELS,
) -> KernelFiles:
    """Compile the kernels for `targets` (and PTX, always); others in `out` stay if they are up to date.

    Raises:
        EngineError: an unknown target, or nvcc refuses a source (its words are in the detail).
    """
    for name in (chosen := tuple(dict.fromkeys((PORTABLE, *targets)))):
        if name not in ARCHITECTURES:
            raise EngineError(
                f"--target {name}: no such target{near_match(name, ARCHITECTURES)}; kernels are compiled for "
                f"{', '.join(ARCHITECTURES)}."
            )
    units = [
        _unit(target, path, compiler, sources) for target in chosen for path in sorted(sources.glob("*.cu"))
    ]
    old = _entries(out)
    entries = {u.file: old[u.file] for u in units if u.file in old and old[u.file]["sources"] == u.sources}
    missing = [unit for unit in units if unit.file not in entries]
    out.mkdir(parents=True, exist_ok=True)
    done = 0

    def compile_one(unit: _Unit) -> None:
        nonlocal done
        entries[unit.file] = _compile(unit, compiler, out, sources)
        done += 1
        progress(unit.file, done, len(missing))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, missing))
    kept = {unit.file: unit for unit in units}
    for file, entry in old.items():
        target, name = entry["target"], entry["unit"]
        current = (sources / f"{name}.cu").is_file() and _unit(
            target, sources / f"{name}.cu", compiler, sources
        )
        if file not in kept and current and current.sources == entry["sources"]:
            kept[file], entries[file] = current, entry
    return _write_index(out, compiler, {file: entries[file] for file in kept})


def _unit(target: str, path: Path, compiler: Compiler, sources: Path) -> _Unit:
    digest = hashlib.sha256(" ".join((compiler.version, target, ARCHITECTURES[target], *FLAGS)).encode())
    for source in (path, *sorted(sources.glob("*.cuh"))):
        digest.update(b"\0" + source.name.encode() + b"\0" + source.read_bytes())
    return _Unit(target, path.stem, digest.hexdigest())


def _entries(out: Path) -> dict[str, dict[str, Any]]:
    """Return what is in `out` by file, damaged files left out."""
    try:
        old = KernelFiles.load(out)
    except EngineError:
        return {}
    found = {}
    for target, part in (old.index["targets"] if old else {}).items():
        for name, file in part["files"].items():
            path = out / file["file"]
            if path.is_file() and sha256(path) == file["sha256"]:
                found[str(file["file"])] = {**file, "target": target, "unit": name}
    return found


def _compile(unit: _Unit, compiler: Compiler, out: Path, sources: Path) -> dict[str, Any]:
    path = out / unit.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / path.name
        kind = "-ptx" if unit.target == PORTABLE else "-cubin"
        # In the sources' folder, by relative names: the result must not depend on where they lie.
        command = [compiler.path, *FLAGS, kind, f"-arch={ARCHITECTURES[unit.target]}", "-o", str(result)]
        ran = subprocess.run(
            [*command, f"{unit.name}.cu"], cwd=sources, capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise EngineError(
                f"{unit.name}.cu: nvcc refuses it for {unit.target}; correct the source.", detail=ran.stderr
            )
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.copyfile(result, partial)
        partial.replace(path)
    entry: dict[str, Any] = {
        "target": unit.target,
        "unit": unit.name,
        "file": unit.file,
        "sources": unit.sources,
    }
    entry |= {"sha256": sha256(path), "bytes": path.stat().st_size}
    if unit.target == PORTABLE:
        return {**entry, **_read_ptx(path.read_text())}
    return {**entry, "resources": _read_resources(ran.stderr)}


_LETTERS = {"u64": "p", "u32": "i", "f32": "f"}


def _read_ptx(text: str) -> dict[str, Any]:
    """Return the ISA version, and each kernel's parameters and threads."""
    kernels = {}
    for name, parameters, rest in re.findall(r"\.entry (\w+)\((.*?)\)(.*?)\{", text, re.S):
        letters = "".join(_LETTERS[kind] for kind in re.findall(r"\.param \.(\w+)", parameters))
        threads = re.search(r"\.maxntid (\d+)", rest)
        kernels[name] = {"arguments": letters, "threads": int(threads[1]) if threads else 0}
    version = re.search(r"\.version (\S+)", text)
    return {"ptx_isa": version[1] if version else "", "kernels": kernels}


def _read_resources(text: str) -> dict[str, dict[str, int]]:
    """Return what `ptxas -v` says of each kernel."""
    found = {}
    for part in text.split("Compiling entry function '")[1:]:
        name = part.partition("'")[0]

        def amount(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        found[name] = {
            "registers": amount(r"Used (\d+) registers"),
            "spill_stores": amount(r"(\d+) bytes spill stores"),
            "spill_loads": amount(r"(\d+) bytes spill loads"),
            "stack": amount(r"(\d+) bytes stack frame"),
            "shared": amount(r"(\d+) bytes smem"),
        }
    return dict(sorted(found.items()))


def _write_index(out: Path, compiler: Compiler, entries: Mapping[str, dict[str, Any]]) -> KernelFiles:
    kernels: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    isa = ""
    for _, entry in sorted(entries.items()):
        target, name = entry["target"], entry["unit"]
        place = targets.setdefault(target, {"files": {}})
        place["files"][name] = {key: value for key, value in entry.items() if key not in ("target", "unit")}
        if target == PORTABLE:
            kernels |= {f"{name}.{kernel}": facts for kernel, facts in entry["kernels"].items()}
            isa = max(isa, entry["ptx_isa"], key=_version)
    plans = json.dumps([plan.as_json() for plan in ALL_PLANS], indent=1) + "\n"
    _replace(out / PLANS_FILE, plans)
    index = {
        "format": FORMAT,
        "nvcc": compiler.version,
        "ptx_isa": isa,
        "plans": hashlib.sha256(plans.encode()).hexdigest(),
        "kernels": dict(sorted(kernels.items())),
        "targets": {name: targets[name] for name in ARCHITECTURES if name in targets},
    }
    _replace(out / INDEX, json.dumps(index, indent=1, sort_keys=True) + "\n")
    wanted = {*entries, PLANS_FILE, INDEX}
    for path in out.rglob("*"):
        if path.is_file() and str(path.relative_to(out)) not in wanted:
            path.unlink()
    return KernelFiles(out, index)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)
