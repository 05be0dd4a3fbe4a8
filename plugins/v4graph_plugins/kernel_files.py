"""Compiled kernels on disk: the bundle of this installation, or the part of it that an engine ships.

A folder with a cubin per target and unit (PTX for `portable`), `plans.json`, and `index.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError
from v4graph.targets import PORTABLE, number

INDEX, PLANS_FILE = "index.json", "plans.json"
FORMAT = 1


@dataclass(frozen=True)
class KernelFiles:
    """A folder of compiled kernels and its index."""

    folder: Path
    index: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path) -> KernelFiles | None:
        """Read the index of a folder; None if it has none.

        Raises:
            EngineError: the index is damaged.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_text())
            wrong = _wrong(index)
        except FileNotFoundError:
            return None
        except ValueError as error:
            index, wrong = {}, str(error)
        if wrong:
            raise EngineError(
                f"{path}: not an index of kernels ({wrong}); compile them again with `v4graph kernels build`."
            )
        return cls(folder, index)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that the folder has kernels for."""
        return tuple(sorted(self.index["targets"], key=lambda t: 10_000 if t == PORTABLE else number(t)))

    def target_for(self, gpu: str) -> str | None:
        """Return the target whose kernels a GPU runs, None if there is none.

        Kernels of an earlier Ampere or Ada run on a later one, those of Hopper and Blackwell on their own
        only; PTX runs on anything since Ampere.
        """
        if gpu in self.targets:
            return gpu
        older = [t for t in self.targets if t != PORTABLE and 80 <= number(t) < min(number(gpu), 90)]
        if number(gpu) < 90 and older:
            return max(older, key=number)
        return PORTABLE if PORTABLE in self.targets and number(gpu) >= 80 else None

    def file(self, target: str, unit: str) -> Path:
        """Return the file of a unit.

        Raises:
            EngineError: the folder has no such unit for the target.
        """
        files = self.index["targets"][target]["files"]
        if unit not in files:
            raise EngineError(
                f"{self.folder}: has no kernels '{unit}' for {target}; compile them with `v4graph kernels "
                "build`."
            )
        return self.folder / str(files[unit]["file"])

    def signature(self, kernel: str) -> str:
        """Return a letter per parameter of a kernel: p address, i int32, f float32.

        Raises:
            EngineError: there is no such kernel.
        """
        if kernel not in self.index["kernels"]:
            raise EngineError(
                f"{self.folder}: has no kernel '{kernel}'; compile them again with `v4graph kernels build`."
            )
        return str(self.index["kernels"][kernel]["arguments"])

    def part(self, targets: Iterable[str]) -> KernelFiles:
        """Return the same with some of the targets only."""
        chosen = {name: self.index["targets"][name] for name in targets}
        return KernelFiles(self.folder, {**self.index, "targets": chosen})

    def paths(self) -> Iterator[str]:
        """Yield the files of the index, relative to the folder, itself last."""
        for target in self.index["targets"].values():
            yield from (str(file["file"]) for file in target["files"].values())
        yield PLANS_FILE
        yield INDEX

    def copy(self, folder: Path) -> None:
        """Copy the files of the index to a folder.

        Raises:
            EngineError: a file is missing or changed.
        """
        for target in self.index["targets"].values():
            for file in target["files"].values():
                source = self.folder / file["file"]
                if not source.is_file() or sha256(source) != file["sha256"]:
                    raise EngineError(
                        f"{source}: is missing or was changed; compile the kernels again with "
                        "`v4graph kernels build`."
                    )
                (folder / file["file"]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / file["file"])
        shutil.copyfile(self.folder / PLANS_FILE, folder / PLANS_FILE)
        (folder / INDEX).write_text(json.dumps(self.index, indent=1, sort_keys=True) + "\n")


def _wrong(index: Any) -> str:
    """Return what an index lacks, or nothing."""
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return f"format {FORMAT} expected"
    for name, kind in (("kernels", dict), ("targets", dict), ("ptx_isa", str)):
        if not isinstance(index.get(name), kind):
            return f"'{name}' is missing"
    if not all(isinstance(target.get("files"), dict) for target in index["targets"].values()):
        return "a target has no 'files'"
    return ""


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
