"""`--embed-weights`: weight inputs become initializers in one safetensors file beside the graph.

The file holds every tensor as the graph wants it (stacked, cast, as bytes), so the folder runs in any
ONNX runtime with nothing of v4graph installed. It is a file of its own, not a link to the checkpoint:
runtimes refuse external data outside the graph's folder, and onnx refuses hard links.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from v4graph.inventory import DTYPE_BYTES
from v4graph.manifest import Binding, Manifest

if TYPE_CHECKING:
    from v4graph.checkpoint import Checkpoint

WEIGHTS_FILE = "weights.safetensors"
_SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "int64": "I64"}
_ALIGNMENT = 64


def embed_weights(model: ir.Model, manifest: Manifest, checkpoint: Checkpoint, folder: Path) -> None:
    """Write the weights beside the graph and turn its weight inputs into external initializers.

    Raises:
        CheckpointError: the checkpoint does not fit the manifest.
    """
    offsets = _write(manifest, checkpoint, folder / WEIGHTS_FILE)
    graph = model.graph
    sizes = {name: _nbytes(binding) for binding in manifest.bindings for name, _ in binding.inputs()}
    for value in [value for value in graph.inputs if value.name in offsets]:
        assert value.name is not None
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            location=WEIGHTS_FILE,
            offset=offsets[value.name],
            length=sizes[value.name],
            dtype=value.dtype or ir.DataType.UNDEFINED,
            shape=value.shape,
            name=value.name,
            base_dir=str(folder),
        )
        graph.inputs.remove(value)
        graph.initializers[value.name] = value


def _nbytes(binding: Binding) -> int:
    return math.prod(binding.shape) * DTYPE_BYTES[_SAFETENSORS[binding.dtype]]


def _write(manifest: Manifest, checkpoint: Checkpoint, path: Path) -> dict[str, int]:
    """Stream every weight input into one safetensors file; return the first byte of each."""
    header: dict[str, object] = {"__metadata__": {"format": "v4graph"}}
    offsets: dict[str, int] = {}
    position = 0
    for binding in manifest.bindings:
        for name, _ in binding.inputs():
            begin, position = position, position + _nbytes(binding)
            offsets[name] = begin
            header[name] = {
                "dtype": _SAFETENSORS[binding.dtype],
                "shape": list(binding.shape),
                "data_offsets": [begin, position],
            }
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in checkpoint.bound(manifest):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {name: 8 + len(text) + begin for name, begin in offsets.items()}
