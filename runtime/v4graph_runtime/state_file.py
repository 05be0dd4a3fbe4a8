"""Groups of tensors and text as a safetensors file with a format version and a checksum per group.

A group can be read, and its checksum tested, without touching the others. Files come into being whole:
written under a temporary name, forced to the disk, renamed.
Source of the format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from v4graph.checkpoint.safetensors_file import NUMPY_DTYPES
from v4graph.errors import SessionError
from v4graph_runtime.state import Array

FORMAT, VERSION = "v4graph-state", "1"
PARTIAL = ".partial"
_CHECKSUM = "sha256."
# A header is small: a length beyond this is no length.
_LONGEST_HEADER = 100_000_000

Groups = Mapping[str, Mapping[str, Array]]
# Returns so many bytes from an offset on, all of which are in the file.
Read = Callable[[int, int], bytes | memoryview]


def pack(kind: str, text: Mapping[str, str], groups: Groups) -> bytes:
    """Return a safetensors file: tensors "group/name", and the text with the checksums as its metadata."""
    text = {**text, "format": FORMAT, "version": VERSION, "kind": kind}
    tensors = {
        f"{group}/{name}": np.ascontiguousarray(array)
        for group, arrays in groups.items()
        for name, array in arrays.items()
    }
    sums = {_CHECKSUM + group: _checksum(text, arrays) for group, arrays in groups.items()}
    return safetensors.numpy.save(tensors, metadata={**text, **sums})


@dataclass(frozen=True)
class StateFile:
    """A file whose header has been read and whose length is right; `what` names it in errors."""

    what: str
    text: Mapping[str, str]
    _sums: Mapping[str, str]
    _entries: Mapping[str, tuple[str, tuple[int, ...], int]]
    _read: Read

    def group(self, name: str, *, check: bool = True) -> dict[str, Array]:
        """Return the arrays of a group, read-only.

        Raises:
            SessionError: the checksum is wrong, and is not asked to be left alone.
        """
        prefix = f"{name}/"
        found = {
            key.removeprefix(prefix): self._array(*entry)
            for key, entry in self._entries.items()
            if key.startswith(prefix)
        }
        if check and self._sums.get(name) != _checksum(self.text, found):
            raise damaged(self.what, f"the checksum of its part '{name}' differs")
        return found

    def _array(self, dtype: str, shape: tuple[int, ...], offset: int) -> Array:
        count = math.prod(shape)
        if not count:
            return np.zeros(shape, NUMPY_DTYPES[dtype])
        size = count * NUMPY_DTYPES[dtype].itemsize
        data = np.frombuffer(self._read(offset, size), np.uint8)
        return data.view(NUMPY_DTYPES[dtype]).reshape(shape)


def unpack(data: bytes, kind: str, what: str) -> StateFile:
    """Read the header of a file in memory.

    Raises:
        SessionError: not such a file, of another version, or shorter or longer than its header says.
    """
    view = memoryview(data)
    return _parse(lambda offset, size: view[offset : offset + size], len(data), kind, what)


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[StateFile]:
    """Read the header of a file on disk; its groups can be read while the block runs.

    Not mapped: a file that somebody cuts while it is mapped ends the process.

    Raises:
        OSError: it cannot be read.
        SessionError: as `unpack`.
    """
    with path.open("rb") as file:

        def read(offset: int, size: int) -> bytes:
            file.seek(offset)
            data = file.read(size)
            if len(data) != size:
                raise damaged(str(path), "it became shorter")
            return data

        yield _parse(read, os.fstat(file.fileno()).st_size, kind, str(path))


def _parse(read: Read, size: int, kind: str, what: str) -> StateFile:
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if size < 8 or length > min(_LONGEST_HEADER, size - 8):
        raise damaged(what, f"it has {size} bytes, fewer than its header")
    try:
        header = json.loads(bytes(read(8, length)))
        text = {str(key): str(value) for key, value in header.pop("__metadata__").items()}
        entries = {name: _entry(8 + length, **item) for name, item in header.items()}
        end = max((stop for *_, stop in entries.values()), default=8 + length)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise damaged(what, "its header is no safetensors header with metadata") from error
    _check_format(text, kind, what)
    if end != size:
        raise damaged(what, f"it has {size} bytes, its header promises {end}")
    sums = {key.removeprefix(_CHECKSUM): text.pop(key) for key in list(text) if key.startswith(_CHECKSUM)}
    return StateFile(what, text, sums, {name: entry[:3] for name, entry in entries.items()}, read)


def _entry(base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[Any, ...]:
    begin, end = data_offsets
    shape_ = tuple(int(size) for size in shape)
    if begin < 0 or any(size < 0 for size in shape_):
        raise ValueError("negative")
    if end - begin != math.prod(shape_) * NUMPY_DTYPES[dtype].itemsize:
        raise ValueError("size")
    return dtype, shape_, base + begin, base + end


def _check_format(text: Mapping[str, str], kind: str, what: str) -> None:
    if text.get("format") != FORMAT or text.get("kind") != kind:
        found = f"a {text['kind']}" if text.get("format") == FORMAT and "kind" in text else "something else"
        raise SessionError(f"{what}: expected a {kind} of v4graph, got {found}; give another file.")
    if text.get("version") != VERSION:
        raise SessionError(
            f"{what}: written in format version {text.get('version')}, this v4graph reads {VERSION}; "
            "read it with the version that wrote it, or take it again with this one."
        )


def damaged(what: str, why: str) -> SessionError:
    """Return the error for contents that cannot be trusted."""
    return SessionError(f"{what}: damaged or cut off: {why}; remove it and take it again.")


def _checksum(text: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    """Return the hex digest of a group and of the text, which every group vouches for."""
    digest = hashlib.sha256(json.dumps(sorted(text.items())).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, even after a crash or a loss of power.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where folders can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
