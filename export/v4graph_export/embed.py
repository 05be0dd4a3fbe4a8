"""`--embed-weights`: weight inputs become initializers stored in a safetensors file beside the graph.

The file holds every tensor as the graph wants it (stacked, cast, as bytes), so the folder runs in
any ONNX runtime with nothing of v4graph installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from v4graph.manifest import Binding, Manifest

if TYPE_CHECKING:
    from v4graph.checkpoint import Checkpoint

WEIGHTS_FILE = "weights.safetensors"
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "int64": "I64"}
_ITEM_SIZE = {"float32": 4, "bfloat16": 2, "int8": 1, "int64": 8}
_ALIGNMENT = 64


def embed_weights(model: ir.Model, manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights file and turn the weight inputs of `model` into external initializers."""
    offsets = _write(manifest, checkpoint, folder / WEIGHTS_FILE)
    graph = model.graph
    for value in list(graph.inputs):
        if value.name not in offsets:
            continue
        assert value.shape is not None
        offset, length = offsets[value.name]
        value.const_value = ir.ExternalTensor(
            location=WEIGHTS_FILE,
            offset=offset,
            length=length,
            dtype=value.dtype or ir.DataType.UNDEFINED,
            shape=value.shape,
            name=value.name,
            base_dir=str(folder),
        )
        graph.inputs.remove(value)
        graph.initializers[value.name] = value


def _inputs(manifest: Manifest) -> dict[str, Binding]:
    return {name: binding for binding in manifest.bindings for name, _ in binding.inputs()}


def _write(manifest: Manifest, checkpoint: Checkpoint, path: Path) -> dict[str, tuple[int, int]]:
    """Stream every bound tensor into one safetensors file; return offset and length of each."""
    header: dict[str, object] = {"__metadata__": {"format": "v4graph"}}
    position = 0
    spans: dict[str, tuple[int, int]] = {}
    for name, binding in _inputs(manifest).items():
        size = int(np.prod(binding.shape)) * _ITEM_SIZE[binding.dtype]
        spans[name] = (position, size)
        header[name] = {
            "dtype": _SAFETENSORS[binding.dtype],
            "shape": list(binding.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in checkpoint.bound(manifest):
            file.seek(8 + len(text) + spans[name][0])
            file.write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())
    return {name: (8 + len(text) + offset, size) for name, (offset, size) in spans.items()}
