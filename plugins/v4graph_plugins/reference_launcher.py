"""Runs op calls through their torch references on the memory that TensorRT hands over.

For engines without kernels and as the oracle of those with kernels: right by definition, and slow.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from v4graph.errors import EngineError
from v4graph.ops import OpSpec
from v4graph_plugins.launcher import DeviceTensor, OpCall

# torch has no constructor from an address; the array interface has no bfloat16, so bytes are viewed.
_INTEGERS = {"float32": "<f4", "bfloat16": "<i2", "int8": "|i1", "int32": "<i4", "int64": "<i8"}


class _CudaArray:
    def __init__(self, tensor: DeviceTensor, stream: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": tensor.shape,
            "typestr": _INTEGERS[tensor.dtype],
            "data": (tensor.address, False),
            "stream": stream or 1,
            "version": 3,
        }


class ReferenceLauncher:
    """`device` is cuda, or cpu where addresses are of host memory (tests)."""

    capturable = False

    def __init__(self, device: str = "cuda") -> None:
        """Import torch.

        Raises:
            EngineError: torch is not installed.
        """
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError as error:
            raise EngineError(
                "the reference launcher needs torch; install it with `pip install 'v4graph[export]'`."
            ) from error
        self._device = device

    def workspace_bytes(self, spec: OpSpec, attributes: Mapping[str, Any], shapes: Sequence[Any]) -> int:
        """Return 0: torch allocates its own."""
        return 0

    def launch(self, call: OpCall) -> None:
        """Compute the outputs and copy them to their addresses, on the caller's stream."""
        if self._device == "cpu":
            self._compute(call)
            return
        with self._torch.cuda.stream(self._torch.cuda.ExternalStream(call.stream)):
            self._compute(call)

    def _compute(self, call: OpCall) -> None:
        inputs = [self._view(tensor, call.stream) for tensor in call.inputs]
        attributes = (call.attributes[name] for name in call.spec.attributes)
        # The references make index tensors of their own, which have to be where their inputs are.
        with self._torch.inference_mode(), self._torch.device(self._device):
            results = call.spec.reference(*inputs, *attributes)
            results = results if isinstance(results, tuple) else (results,)
            # All are computed before the first is written: an aliased output is an input too.
            for tensor, result in zip(call.outputs, results, strict=True):
                self._view(tensor, call.stream).copy_(result)

    def _view(self, tensor: DeviceTensor, stream: int) -> Any:
        torch = self._torch
        dtype = getattr(torch, tensor.dtype)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype, device=self._device)
        if self._device == "cpu":
            memory = (ctypes.c_byte * tensor.nbytes).from_address(tensor.address)
            return torch.frombuffer(memory, dtype=dtype).reshape(tensor.shape)
        array = torch.as_tensor(_CudaArray(tensor, stream), device=self._device)
        return array if array.dtype == dtype else array.view(dtype)
