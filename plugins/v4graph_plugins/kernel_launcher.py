"""Runs op calls by their launch plans, on a backend: the CUDA driver, or the CPU emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from v4graph.errors import EngineError
from v4graph.launch import PLANS, Argument, Launch, Launches, evaluate_plan
from v4graph.ops import OpSpec
from v4graph_plugins.launcher import OpCall

_LETTERS = {"input": "p", "output": "p", "workspace": "p", "int32": "i", "float32": "f"}


class Backend(Protocol):
    """Runs single launches."""

    @property
    def capturable(self) -> bool:
        """Whether a stream may be captured into a CUDA graph while it launches."""

    def signature(self, kernel: str) -> str:
        """Return a letter per parameter of a kernel: p address, i int32, f float32."""

    def run(self, launch: Launch, values: Sequence[Any], stream: int) -> None:
        """Enqueue one launch; `values` are ctypes numbers in the order of the kernel's parameters."""


class KernelLauncher:
    """A `Launcher` that follows launch plans."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._evaluated: dict[Any, Launches] = {}

    @property
    def capturable(self) -> bool:
        """Whether a stream may be captured into a CUDA graph while it launches."""
        return self._backend.capturable

    def workspace_bytes(self, spec: OpSpec, attributes: Mapping[str, Any], shapes: Sequence[Any]) -> int:
        """Return the scratch bytes that a call at most needs; `shapes` are of the inputs, largest first."""
        dtypes = ["bfloat16" if "bfloat16" in port.dtypes else port.dtypes[0] for port in spec.inputs]
        return plan_workspace(spec, attributes, shapes, dtypes)

    def launch(self, call: OpCall) -> None:
        """Enqueue the launches of one call.

        Raises:
            EngineError: no kernel takes the call's dtypes or shapes.
        """
        _check_aliases(call)
        for launch in self._launches(call).launches:
            values = [self._value(argument, call) for argument in launch.arguments]
            given = "".join(_LETTERS[argument.kind] for argument in launch.arguments)
            if given != self._backend.signature(launch.kernel):
                raise EngineError(
                    f"{call.spec.name}: its plan passes ({given}) to {launch.kernel}, which takes "
                    f"({self._backend.signature(launch.kernel)}); the kernels are of another version."
                )
            self._backend.run(launch, values, call.stream)

    def _launches(self, call: OpCall) -> Launches:
        shapes = tuple(tensor.shape for tensor in call.inputs)
        dtypes = tuple(tensor.dtype for tensor in call.inputs)
        key = (call.spec.name, tuple(call.attributes.items()), shapes, dtypes)
        if key not in self._evaluated:
            _check_dtypes(call)
            self._evaluated[key] = evaluate_plan(
                PLANS[call.spec.name], call.spec, call.attributes, shapes, dtypes
            )
        return self._evaluated[key]

    @staticmethod
    def _value(argument: Argument, call: OpCall) -> Any:
        if argument.kind == "int32":
            return ctypes.c_int32(int(argument.value))
        if argument.kind == "float32":
            return ctypes.c_float(argument.value)
        if argument.kind == "workspace":
            return ctypes.c_void_p(call.workspace + int(argument.value))
        tensors = call.inputs if argument.kind == "input" else call.outputs
        return ctypes.c_void_p(tensors[int(argument.value)].address)


def plan_workspace(
    spec: OpSpec, attributes: Mapping[str, Any], shapes: Sequence[Any], dtypes: Sequence[str]
) -> int:
    """Return the scratch bytes of an op's kernels at the largest shapes; 0 where none take such a call."""
    floats = [dtype for port, dtype in zip(spec.inputs, dtypes, strict=True) if "bfloat16" in port.dtypes]
    if spec.name not in PLANS or any(dtype != "bfloat16" for dtype in floats):
        return 0
    return evaluate_plan(PLANS[spec.name], spec, attributes, shapes, dtypes).workspace


def _check_dtypes(call: OpCall) -> None:
    for port, tensor in zip(call.spec.inputs, call.inputs, strict=True):
        if "bfloat16" in port.dtypes and tensor.dtype != "bfloat16":
            raise EngineError(
                f"{call.spec.name}: input '{port.name}' is {tensor.dtype}, the kernels compute in bfloat16; "
                "export the graph with `--dtype bf16`."
            )


def _check_aliases(call: OpCall) -> None:
    addresses = {
        port.name: tensor.address for port, tensor in zip(call.spec.inputs, call.inputs, strict=True)
    }
    for port, tensor in zip(call.spec.outputs, call.outputs, strict=True):
        if port.alias and tensor.address != addresses[port.alias]:
            raise EngineError(
                f"{call.spec.name}: output '{port.name}' is not in the memory of '{port.alias}', which the "
                "kernels update in place; bind both to one buffer."
            )
