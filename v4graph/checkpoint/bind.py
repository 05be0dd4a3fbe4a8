"""Checkpoint tensors -> the weight inputs of a graph, by the layouts of the manifest's bindings.

`plan` needs headers only, so that a wrong checkpoint is refused before any data is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from v4graph.checkpoint.names import split_expert
from v4graph.checkpoint.reader import FLOAT_DTYPES, TensorTable
from v4graph.config import ModelConfig
from v4graph.errors import CheckpointError
from v4graph.inventory import FP4_BLOCK, FP8_BLOCK, StoredTensor
from v4graph.manifest import Binding
from v4graph.numerics import BF16, dequantise_fp4, dequantise_fp8

Array = npt.NDArray[Any]

_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": BF16,
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "int32": "I32", "int64": "I64"}
# Fields of ModelConfig that do not change the graph.
_NOT_IN_GRAPH = ("layers", "mtp_layers", "weight_format", "bos_token_id", "eos_token_id", "raw")
_REBIND = "give the checkpoint that the graph was exported for, or export the graph again from this one."


def plan(path: Path, table: TensorTable, binding: Binding, layer: int | None) -> None:
    """Check that a binding can be made, from headers alone.

    Raises:
        CheckpointError: a tensor is missing, or its dtype or shape is not the graph's.
    """
    wanted = binding.shape[1:] if "stack" in binding.layout else binding.shape
    scales = binding.scales(layer)
    for i, name in enumerate(binding.tensors(layer)):
        if name not in table:
            raise CheckpointError(f"{path}: no tensor {name}, which the graph takes; {_REBIND}")
        header = table.header(name)
        _check_dtype(path, header, binding)
        shape = header.shape
        if "dequantise" in binding.layout:
            shape = _check_scale(path, table, header, scales[i])
        if shape != wanted:
            raise CheckpointError(
                f"{path}: {name} gives shape {list(shape)}, the graph takes {list(wanted)}; {_REBIND}"
            )


def _check_dtype(path: Path, header: StoredTensor, binding: Binding) -> None:
    widened = {header.dtype, binding.stored_dtype} <= FLOAT_DTYPES
    exact = "cast" in binding.layout or "dequantise" in binding.layout or binding.dtype == "float32"
    if header.dtype == binding.stored_dtype or (widened and exact):
        return
    raise CheckpointError(
        f"{path}: {header.name} is stored as {header.dtype}, the graph was exported for "
        f"{binding.stored_dtype}; {_REBIND}"
    )


def _check_scale(path: Path, table: TensorTable, weight: StoredTensor, scale: str) -> tuple[int, ...]:
    """Return the shape of the dequantised weight."""
    rows, columns = weight.shape
    if weight.dtype == "I8":
        shape, blocks = (rows, 2 * columns), (rows, 2 * columns // FP4_BLOCK)
    else:
        shape, blocks = (rows, columns), (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    got = table.header(scale).shape
    if got != blocks:
        raise CheckpointError(
            f"{path}: {scale} has shape {list(got)}, which does not cover its weight {list(weight.shape)}; "
            f"expected {list(blocks)}, so convert or download the checkpoint again."
        )
    return shape


def bind(path: Path, table: TensorTable, binding: Binding, layer: int | None) -> Array:
    """Make one graph input; a view where the layout allows, otherwise one new array.

    Raises:
        CheckpointError: a tensor is missing, or its dtype or shape is not the graph's.
    """
    plan(path, table, binding, layer)
    names, scales = binding.tensors(layer), binding.scales(layer)
    dtype = _DTYPES[binding.dtype]
    if "stack" not in binding.layout:
        return _contiguous(_convert(table, names[0], scales[0] if scales else "", binding, dtype))
    split = split_expert(names[0])
    if split and split[0] in table and "dequantise" not in binding.layout:
        whole = table.array(split[0])
        if len(whole) == len(names):
            return _contiguous(_cast(whole, binding, dtype))
    stacked = np.empty(binding.shape, dtype)
    for e, name in enumerate(names):
        stacked[e] = _convert(table, name, scales[e] if scales else "", binding, dtype)
    return stacked


def _convert(table: TensorTable, name: str, scale: str, binding: Binding, dtype: np.dtype[Any]) -> Array:
    data = table.array(name)
    if "dequantise" in binding.layout:
        decode = dequantise_fp4 if data.dtype == np.int8 else dequantise_fp8
        data = decode(data, table.array(scale))
    return _cast(data, binding, dtype)


def _cast(data: Array, binding: Binding, dtype: np.dtype[Any]) -> Array:
    return data.view(dtype) if "bytes" in binding.layout else data.astype(dtype, copy=False)


def _contiguous(data: Array) -> Array:
    """Copy only what a file stores unaligned or interleaved."""
    return np.require(data, requirements=("C", "A"))


def check_config(path: Path, found: ModelConfig, exported: ModelConfig) -> None:
    """Check that a checkpoint's configuration gives the exported graph, or a deeper one of the same kind.

    Equal shapes are not enough: a RoPE base or a clamp that differs would run and give nonsense.

    Raises:
        CheckpointError: a value that the graph was built with differs, named with both values.
    """
    depth = len(exported.layers)
    if found.layers[:depth] != exported.layers:
        raise CheckpointError(
            f"{path}: its {len(found.layers)} layers are not those of the graph, which has {depth}; {_REBIND}"
        )
    for name, wanted in vars(exported).items():
        if name not in _NOT_IN_GRAPH and getattr(found, name) != wanted:
            raise CheckpointError(
                f"{path}: config.json gives {name} = {getattr(found, name)}, the graph was exported with "
                f"{wanted}; {_REBIND}"
            )
