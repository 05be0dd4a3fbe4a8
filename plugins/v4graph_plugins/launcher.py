"""What a plugin's enqueue hands over: one op call on device memory.

A launcher runs it. `ReferenceLauncher` runs the op's torch reference, which is right, slow, and needs
no kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from v4graph.ops import OpSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class DeviceTensor:
    """A dense row-major tensor at a device address."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class OpCall:
    """One call: tensors in the order of the op's ports; aliased outputs share an input's address."""

    spec: OpSpec
    attributes: Mapping[str, Any]
    inputs: Sequence[DeviceTensor]
    outputs: Sequence[DeviceTensor]
    workspace: int
    stream: int


class Launcher(Protocol):
    """Runs op calls on a stream."""

    @property
    def capturable(self) -> bool:
        """Whether a stream may be captured into a CUDA graph while it launches."""

    def workspace_bytes(self, spec: OpSpec, attributes: Mapping[str, Any], shapes: Sequence[Any]) -> int:
        """Return the scratch bytes that a call at most needs; `shapes` are of the inputs, largest first."""

    def launch(self, call: OpCall) -> None:
        """Enqueue one call."""
