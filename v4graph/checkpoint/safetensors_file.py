"""One .safetensors file -> its tensors as read-only views of a memory map.

The safetensors library copies every tensor that it hands to numpy, and knows no numpy type for
F8_E4M3 and F8_E8M0; a view of the map costs nothing and has the ml_dtypes type. The format is
eight bytes of header length, a JSON header, and the data.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from v4graph.errors import CheckpointError
from v4graph.inventory import DTYPE_BYTES, StoredTensor
from v4graph.numerics import BF16, E4M3, E8M0

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": E4M3,
    "F8_E8M0": E8M0,
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": BF16,
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
    "F64": np.dtype(np.float64),
}
_AGAIN = "download or copy the file again."


class Entry(NamedTuple):
    """A tensor of a file: `offset` is its first byte, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """The tensors of one file; the header is read and checked on opening, the data is mapped on demand."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: not a safetensors file, or shorter than its header says.
        """
        self.path = path
        self.tensors = _read_header(path)
        self._map: npt.NDArray[np.uint8] | None = None

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only view of a tensor."""
        dtype, shape, offset = self.tensors[name]
        if self._map is None:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._map = np.frombuffer(mapped, np.uint8)
        data = self._map[offset : offset + math.prod(shape) * DTYPE_BYTES[dtype]]
        return data.view(NUMPY_DTYPES[dtype]).reshape(shape)


def _read_header(path: Path) -> dict[str, Entry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + length > size:
                raise CheckpointError(
                    f"{path}: truncated or not a safetensors file: its header needs {8 + length} bytes "
                    f"but the file has {size}; {_AGAIN}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        items = [_parse(name, **item) for name, item in raw.items()]
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is not valid JSON of tensors; {_AGAIN}"
        ) from error
    for tensor, begin, end in items:
        _check_span(path, tensor, begin, end, size - 8 - length)
    return {tensor.name: Entry(tensor.dtype, tensor.shape, 8 + length + begin) for tensor, begin, _ in items}


def _parse(name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> tuple[StoredTensor, int, int]:
    begin, end = map(operator.index, data_offsets)
    return StoredTensor(name, dtype, tuple(map(operator.index, shape))), begin, end


def _check_span(path: Path, tensor: StoredTensor, begin: int, end: int, available: int) -> None:
    if tensor.dtype not in NUMPY_DTYPES:
        raise CheckpointError(f"{path}: {tensor.name} has dtype {tensor.dtype}, which v4graph does not read.")
    if end - begin != tensor.nbytes or begin < 0:
        raise CheckpointError(
            f"{path}: {tensor.name} spans {end - begin} bytes in the header, expected {tensor.nbytes} for "
            f"{tensor.dtype} {list(tensor.shape)}; {_AGAIN}"
        )
    if end > available:
        raise CheckpointError(
            f"{path}: truncated: {tensor.name} ends at byte {end} of the data, which has {available}; "
            f"{_AGAIN}"
        )
