"""Runs a lowered graph node by node on the CPU, every custom op through its TensorRT plugin's enqueue.

onnx's reference evaluator runs the native nodes. Plugins get host addresses, as aligned as a GPU's; their
aliased outputs are the very arrays of their inputs, as TensorRT's are. Memory that nothing has written
holds NaNs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401 - np.dtype("bfloat16")
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from plugin_types import plugin_fields

from v4graph.ops import OpSpec
from v4graph_plugins.catalogue import PLUGIN_OPS
from v4graph_plugins.launcher import Launcher
from v4graph_plugins.plugin import DTYPES, Findings, plugin_classes
from v4graph_plugins.reference_launcher import ReferenceLauncher

ALIGNMENT = 256


def aligned(nbytes: int) -> np.ndarray[Any, Any]:
    """Return `nbytes` of 0xff at a multiple of 256."""
    raw = np.full(nbytes + ALIGNMENT, 0xFF, np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + nbytes]


def settled(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array, or a copy that is dense and starts at a multiple of 256."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Interpreter:
    """A lowered graph; `calls` counts plugin calls by op. Without a launcher the torch references run."""

    def __init__(self, trt: Any, lowered: bytes, launcher: Launcher | None = None) -> None:
        self.trt = trt
        self.calls: dict[str, int] = {}
        findings = Findings()
        findings.launcher = launcher or ReferenceLauncher("cpu")
        self.numpy_dtypes = {getattr(trt, name): np.dtype(name) for name in DTYPES}
        self.creators = {spec.name: plugin_classes(trt, findings)[1](spec) for spec in PLUGIN_OPS}
        model = onnx.load_from_string(lowered)
        self.outputs = [value.name for value in model.graph.output]
        self.evaluator = ReferenceEvaluator(model, new_ops=[self._op(spec) for spec in PLUGIN_OPS])

    def run(self, feeds: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """Run once; state arrays of `feeds` are updated in place."""
        return dict(zip(self.outputs, self.evaluator.run(None, feeds), strict=True))

    def _op(self, spec: OpSpec) -> type[OpRun]:
        def _run(op: OpRun, *inputs: Any, **attributes: Any) -> tuple[Any, ...]:
            return self._enqueue(spec, inputs, attributes)

        return type(spec.name, (OpRun,), {"op_domain": "v4graph", "_run": _run})

    def _enqueue(self, spec: OpSpec, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> tuple[Any, ...]:
        self.calls[spec.name] = self.calls.get(spec.name, 0) + 1
        plugin = self.creators[spec.name].create_plugin(spec.name, plugin_fields(attributes), None)
        arrays = [settled(array) for array in inputs]
        named = {port.name: array.shape for port, array in zip(spec.inputs, arrays, strict=True)}
        shapes = spec.output_shapes(named, plugin.attributes)
        descs = [self._desc(array) for array in arrays]
        dtypes = plugin.get_output_data_types([desc.type for desc in descs])
        outputs = []
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
            source = plugin.get_aliased_input(i)
            assert source < 0 or arrays[source] is inputs[source], "a state has to be aligned from the start"
            kind = self.numpy_dtypes[dtype]
            nbytes = int(np.prod(shape)) * kind.itemsize
            outputs.append(aligned(nbytes).view(kind).reshape(shape) if source < 0 else arrays[source])
        largest = [SimpleNamespace(max=array.shape, desc=self._desc(array)) for array in arrays]
        workspace = aligned(plugin.get_workspace_size(largest, []))
        plugin.on_shape_change(descs, [])
        plugin.enqueue(
            descs,
            [self._desc(array) for array in outputs],
            [array.ctypes.data for array in arrays],
            [array.ctypes.data for array in outputs],
            workspace.ctypes.data,
            0,
        )
        return tuple(outputs)

    def _desc(self, array: np.ndarray[Any, Any]) -> Any:
        linear = self.trt.TensorFormat.LINEAR
        return SimpleNamespace(dims=array.shape, type=getattr(self.trt, str(array.dtype)), format=linear)
