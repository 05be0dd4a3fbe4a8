"""Writes a checkpoint directory tensor by tensor: shards, index, and a rename when all is there.

Every tensor's place is planned from its dtype and shape, so data may come in any order and only one
tensor is in memory at a time. Within a shard wide types come first: all tensors lie aligned.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from v4graph.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from v4graph.checkpoint.safetensors_file import NUMPY_DTYPES
from v4graph.errors import CheckpointError
from v4graph.inventory import DTYPE_BYTES, StoredTensor

SHARD_BYTES = 5_000_000_000
# Bytes written so far and in all.
Progress = Callable[[int, int], None]

_HEADER_ALIGNMENT = 64


def check_target(path: Path) -> None:
    """Refuse a target that exists and is not an empty directory.

    Raises:
        CheckpointError: there is something already.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise CheckpointError(
            f"{path}: exists already and is not an empty directory; give another name or remove it."
        )


class CheckpointWriter:
    """A checkpoint directory in the making; use as a context manager.

    Leaving the block without an error renames the directory into place, with one, removes it.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[StoredTensor],
        shard_bytes: int = SHARD_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """Plan the shards; nothing is written before the block is entered.

        Raises:
            CheckpointError: `path` exists and is not an empty directory.
        """
        check_target(path)
        self.path = path
        self._shards = list(_split(tensors, shard_bytes))
        self._total = sum(tensor.nbytes for shard in self._shards for tensor in shard)
        self._progress = progress or (lambda done, total: None)
        self._done = 0
        self._places: dict[str, tuple[IO[bytes], int, StoredTensor]] = {}
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            name = tempfile.mkdtemp(prefix=f".{self.path.name}.partial-", dir=self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error
        self.directory = Path(name)
        self.directory.chmod(0o755)
        names = _shard_names(len(self._shards))
        try:
            for file_name, shard in zip(names, self._shards, strict=True):
                self._begin(self.directory / file_name, shard)
            if len(names) > 1:
                self._write_index(names)
        except OSError as error:
            self._discard()
            raise self._unwritable(error) from error
        return self

    def _begin(self, path: Path, shard: list[StoredTensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        offsets = []
        for tensor in sorted(shard, key=lambda t: (-DTYPE_BYTES[t.dtype], t.name)):
            offsets.append((tensor, offset))
            span = [offset, offset + tensor.nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _HEADER_ALIGNMENT)
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
        self._places |= {tensor.name: (file, 8 + len(text) + start, tensor) for tensor, start in offsets}

    def _write_index(self, names: list[str]) -> None:
        pairs = zip(names, self._shards, strict=True)
        weight_map = {tensor.name: name for name, shard in pairs for tensor in shard}
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        self.write_text(INDEX_NAME, json.dumps(index, indent=1) + "\n")

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Write one planned tensor; its dtype and shape must be the planned ones."""
        self.write_parts(name, [data])

    def write_parts(self, name: str, parts: Iterable[npt.NDArray[Any]]) -> None:
        """Write one planned tensor in pieces that follow each other along its first axis."""
        file, offset, tensor = self._places.pop(name)
        file.seek(offset)
        written = 0
        for part in parts:
            if part.dtype != NUMPY_DTYPES[tensor.dtype]:
                raise ValueError(f"{name}: {part.dtype} written, {tensor.dtype} planned")
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            written += part.nbytes
            self._done += part.nbytes
            self._progress(self._done, self._total)
        if written != tensor.nbytes:
            raise ValueError(f"{name}: {written} bytes written, {tensor.nbytes} planned")

    def write_text(self, name: str, text: str) -> None:
        """Write a small file beside the weights."""
        (self.directory / name).write_text(text, encoding="utf-8")

    def copy(self, source: Path) -> None:
        """Copy a small file, its symlink resolved, under its own name."""
        shutil.copyfile(source, self.directory / source.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                return
        except BaseException as failure:
            self._discard()
            if isinstance(failure, OSError):
                raise self._unwritable(failure) from failure
            raise
        self._discard()
        if isinstance(error, OSError):
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.path}: cannot be written ({error}); nothing is left of it.")

    def _finish(self) -> None:
        if self._places:
            raise ValueError(f"planned but never written: {next(iter(self._places))}")
        for file in self._files:
            file.close()
        os.rename(self.directory, self.path)

    def _discard(self) -> None:
        for file in self._files:
            # Closing flushes, which fails again on a full disk.
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _split(tensors: Iterable[StoredTensor], shard_bytes: int) -> Iterator[list[StoredTensor]]:
    """Cut the tensors, in order, into shards of at most `shard_bytes`; a larger tensor is alone."""
    shard: list[StoredTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
