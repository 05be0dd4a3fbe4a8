"""A checkpoint directory -> its tensors under official names, as views of memory-mapped files.

Source: the layout of Hugging Face checkpoints (config.json, model.safetensors.index.json, shards).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.checkpoint.names import GATE_UP, is_stacked, official_name, split_expert
from v4graph.checkpoint.safetensors_file import SafetensorsFile
from v4graph.config import ModelConfig, WeightFormat
from v4graph.errors import CheckpointError, near_match
from v4graph.inventory import StoredTensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_DTYPES = frozenset(("BF16", "F16", "F32"))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies: a stored tensor, or half `half` (0 or 1) of the rows of stacked matrices."""

    file: SafetensorsFile
    stored_name: str
    half: int | None = None

    def header(self, name: str) -> StoredTensor:
        """Return dtype and shape, without touching the data."""
        dtype, shape, _ = self.file.tensors[self.stored_name]
        if self.half is not None:
            shape = (shape[0], shape[1] // 2, shape[2])
        return StoredTensor(name, dtype, shape)

    def array(self) -> npt.NDArray[Any]:
        """Return a read-only view of the data."""
        whole = self.file.array(self.stored_name)
        if self.half is None:
            return whole
        rows = whole.shape[1] // 2
        return whole[:, self.half * rows : (self.half + 1) * rows]


def find_files(path: Path) -> list[Path]:
    """Return the .safetensors files of a checkpoint directory, or the one file that `path` is.

    Raises:
        CheckpointError: nothing there, or a shard that the index names is missing.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory or .safetensors file; give a checkpoint directory.")
    if (path / INDEX_NAME).is_file():
        return _indexed_files(path)
    if (path / SINGLE_NAME).is_file():
        return [path / SINGLE_NAME]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(
            f"{path}: no .safetensors file here; give the directory that holds the weights."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{path}: {len(found)} .safetensors files but no {INDEX_NAME}; copy the index too."
        )
    return found


def _indexed_files(path: Path) -> list[Path]:
    index = path / INDEX_NAME
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: not a valid index (no weight_map); download it again.") from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
        raise CheckpointError(
            f"{path}: shard {missing[0]}{more} is missing, {INDEX_NAME} names it; download it again."
        )
    return [path / name for name in names]


def read_slots(files: list[Path]) -> dict[str, Slot]:
    """Open the files' headers and return every tensor by its official name.

    Raises:
        CheckpointError: a file is damaged, or two tensors have the same official name.
    """
    slots: dict[str, Slot] = {}
    for file in map(SafetensorsFile, files):
        for stored in file.tensors:
            name = official_name(stored)
            if name.endswith(GATE_UP) and len(file.tensors[stored].shape) == 3:
                # transformers stacks w1 above w3; the halves are the packed tensors.
                parts: dict[str, int | None] = {
                    name.replace("gate_up", f"w{1 + 2 * half}.weight"): half for half in (0, 1)
                }
            else:
                parts = {name: None}
            for part, half in parts.items():
                if part in slots:
                    raise CheckpointError(
                        f"{file.path}: {stored} and {slots[part].stored_name} are both {part}; "
                        "remove one of them."
                    )
                slots[part] = Slot(file, stored, half)
    return slots


class TensorTable:
    """Tensors by official name; experts are found alone or inside the stacked tensors of packed files."""

    def __init__(self, path: Path, slots: Mapping[str, Slot]) -> None:
        self._path = path
        self._slots = slots
        self.packed = any(is_stacked(name) for name in slots)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def __iter__(self) -> Iterator[str]:
        """Yield the names as stored, stacked tensors under their stacked name."""
        return iter(self._slots)

    def _find(self, name: str) -> tuple[Slot, int | None] | None:
        if name in self._slots:
            return self._slots[name], None
        stacked = split_expert(name) if self.packed else None
        if stacked is None or stacked[0] not in self._slots:
            return None
        slot = self._slots[stacked[0]]
        return (slot, stacked[1]) if stacked[1] < slot.header(name).shape[0] else None

    def _get(self, name: str) -> tuple[Slot, int | None]:
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self._path}: no tensor {name}{near_match(name, self._slots) or '.'}")
        return found

    def header(self, name: str) -> StoredTensor:
        """Return a tensor's stored dtype and shape.

        Raises:
            CheckpointError: there is no such tensor.
        """
        slot, expert = self._get(name)
        stored = slot.header(name)
        return stored if expert is None else StoredTensor(name, stored.dtype, stored.shape[1:])

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only view of a tensor, without a copy.

        Raises:
            CheckpointError: there is no such tensor.
        """
        slot, expert = self._get(name)
        return slot.array() if expert is None else slot.array()[expert]

    def location(self, name: str) -> tuple[Path, int, int]:
        """Return the real file (symlinks resolved), first byte and size of a contiguous tensor.

        Raises:
            CheckpointError: there is no such tensor, or it is half of a fused one.
        """
        slot, expert = self._get(name)
        if slot.half is not None:
            raise CheckpointError(
                f"{self._path}: {name} is not contiguous; make a packed copy with `v4graph pack`."
            )
        stored = self.header(name)
        offset = slot.file.tensors[slot.stored_name].offset + (expert or 0) * stored.nbytes
        return slot.file.path.resolve(), offset, stored.nbytes

    def fingerprint(self, data: bool) -> str:
        """Return a SHA-256 over names, dtypes and shapes, and over the bytes when `data` is set."""
        digest = hashlib.sha256()
        for name in sorted(self._slots):
            stored = self.header(name)
            digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            if data:
                digest.update(np.ascontiguousarray(self.array(name)).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def detect_format(table: TensorTable, config: ModelConfig) -> WeightFormat:
    """Return the weight format of the first layer's tensors, or the config's where they are missing."""
    announced = config.weight_format
    prefix = "layers.0.attn.wq_a."
    if prefix + "weight" not in table:
        return announced
    linear = table.header(prefix + "weight").dtype
    scale = table.header(prefix + "scale").dtype if prefix + "scale" in table else ""
    expert_name = "layers.0.ffn.experts.0.w1.weight"
    expert = table.header(expert_name).dtype if expert_name in table else ""
    return WeightFormat(
        linear="float" if linear in FLOAT_DTYPES else "fp8",
        scale="float32" if scale == "F32" else "e8m0",
        expert="fp4" if expert == "I8" else "fp8" if expert == "F8_E4M3" else "float",
        plain="float32" if any(map(_is_wide_matrix, map(table.header, table))) else "bfloat16",
    )


def _is_wide_matrix(tensor: StoredTensor) -> bool:
    """Whether a tensor is a plain matrix that bfloat16 does not hold; what no graph reads aside."""
    matrix = tensor.name.endswith(".weight") and len(tensor.shape) > 1
    return matrix and tensor.dtype in FLOAT_DTYPES - {"BF16"} and not tensor.name.startswith("mtp.")
