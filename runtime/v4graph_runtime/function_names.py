"""The names of an ONNX file's functions, read from its bytes: the runtime does without the onnx package.

Source: onnx.proto, ModelProto.functions (field 25) and FunctionProto.name (field 1); protobuf's wire format.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FUNCTIONS, _NAME = 25, 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def function_names(path: Path) -> tuple[str, ...]:
    """Return the names of the functions of a model file, in its order; none if the file is not a model."""
    data = memoryview(path.read_bytes())
    try:
        return tuple(
            bytes(value).decode()
            for number, function in _fields(data)
            if number == _FUNCTIONS
            for inner, value in _fields(function)
            if inner == _NAME
        )
    except (IndexError, ValueError):
        # onnxruntime says what is wrong with the file.
        return ()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of each length-delimited field; others are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
