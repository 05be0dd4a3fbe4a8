"""Runs one op case through a launcher on guarded host memory and compares it with the torch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from guarded import Guarded
from op_cases import OpCase
from torch import Tensor

from v4graph.ops import Port
from v4graph.ops.tolerance import mismatch
from v4graph_plugins.launcher import DeviceTensor, Launcher, OpCall

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class KernelCase:
    """An op case, in bf16; `change` edits its random inputs by port name, `label` says to what."""

    case: OpCase
    label: str = ""
    change: Callable[[Inputs], None] | None = None

    def __str__(self) -> str:
        return f"{self.case}{'-' + self.label if self.label else ''}"

    def inputs(self, seed: int = 0) -> Inputs:
        """Return the inputs, float ports in bf16."""
        inputs = self.case.inputs(seed)
        for port in self.case.spec.inputs:
            if "bfloat16" in port.dtypes:
                inputs[port.name] = inputs[port.name].bfloat16()
        if self.change:
            self.change(inputs)
        return inputs


class HostMemory:
    """Tensors in guarded host memory, for the emulator."""

    def __init__(self) -> None:
        self._kept: list[Guarded] = []

    def put(self, tensor: Tensor) -> DeviceTensor:
        """Copy a tensor in."""
        place = self.reserve(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if place.nbytes:
            self._kept[-1].bytes[:] = tensor.contiguous().view(torch.uint8).numpy().ravel()
        return place

    def reserve(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        """Return uninitialised memory (all NaN)."""
        tensor = DeviceTensor(0, shape, dtype)
        block = Guarded(tensor.nbytes)
        self._kept.append(block)
        return DeviceTensor(block.address, shape, dtype)

    def get(self, tensor: DeviceTensor) -> Tensor:
        """Copy a tensor out."""
        block = next(block for block in self._kept if block.address == tensor.address)
        raw = torch.from_numpy(block.bytes.copy())
        return raw.view(getattr(torch, tensor.dtype)).reshape(tensor.shape)


def run(
    case: KernelCase, launcher: Launcher, memory: Any, seed: int = 0
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Return the outputs of the kernels and those of the reference."""
    spec, inputs = case.case.spec, case.inputs(seed)
    want = case.case.reference({name: tensor.clone() for name, tensor in inputs.items()})
    places = {name: memory.put(tensor) for name, tensor in inputs.items()}
    outputs = [
        places[port.alias] if port.alias else memory.reserve(tuple(result.shape), dtype_of(port))
        for port, result in zip(spec.outputs, want, strict=True)
    ]
    shapes = [tuple(tensor.shape) for tensor in inputs.values()]
    workspace = memory.reserve((launcher.workspace_bytes(spec, case.case.attributes, shapes),), "int8")
    launcher.launch(OpCall(spec, case.case.attributes, list(places.values()), outputs, workspace.address, 0))
    return [memory.get(output) for output in outputs], want


def check(case: KernelCase, launcher: Launcher, memory: Any = None, seed: int = 0) -> None:
    """Assert that the kernels give the reference's numbers within the op's tolerance, and change no input."""
    got, want = run(case, launcher, memory or HostMemory(), seed)
    problems = []
    for port, mine, reference in zip(case.case.spec.outputs, got, want, strict=True):
        dtype = "bfloat16"
        text = mismatch(case.case.spec, as_numpy(mine), as_numpy(reference), case.case.attributes, dtype)
        problems += [f"{port.name}: {text}"] if text else []
    assert not problems, f"{case}: " + "; ".join(problems)


def dtype_of(port: Port) -> str:
    """Return the dtype of an output in a bf16 graph."""
    return "bfloat16" if "bfloat16" in port.dtypes else port.dtypes[0]


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as numpy, bf16 as float32."""
    array: np.ndarray[Any, Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array
