"""Runs a lowered graph node by node on the CPU, every custom op through its TensorRT plugin's enqueue.

onnx's reference evaluator runs the native nodes. Plugins get host addresses, and their aliased outputs
are the very arrays of their inputs, as TensorRT's are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from v4graph.ops import OpSpec
from v4graph_plugins.catalogue import PLUGIN_OPS
from v4graph_plugins.plugin import Findings, plugin_classes
from v4graph_plugins.reference_launcher import ReferenceLauncher


class Interpreter:
    """A lowered float32 graph; `calls` counts plugin calls by op."""

    def __init__(self, trt: Any, lowered: bytes) -> None:
        self.trt = trt
        self.calls: dict[str, int] = {}
        findings = Findings()
        findings.launcher = ReferenceLauncher("cpu")
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
        fields = [
            SimpleNamespace(name=name, data=np.frombuffer(value.encode() + b"\0", np.int8))
            if isinstance(value, str)
            else SimpleNamespace(name=name, data=np.array([value]))
            for name, value in attributes.items()
        ]
        plugin = self.creators[spec.name].create_plugin(spec.name, fields, None)
        arrays = [array if array.flags.c_contiguous else array.copy() for array in inputs]
        named = {port.name: array.shape for port, array in zip(spec.inputs, arrays, strict=True)}
        shapes = spec.output_shapes(named, plugin.attributes)
        outputs = []
        for i, (port, shape) in enumerate(zip(spec.outputs, shapes, strict=True)):
            source = plugin.get_aliased_input(i)
            dtype = "float32" if "float32" in port.dtypes else port.dtypes[0]
            outputs.append(np.empty(shape, dtype) if source < 0 else arrays[source])
        plugin.on_shape_change([self._desc(array) for array in arrays], [])
        plugin.enqueue(
            [self._desc(array) for array in arrays],
            [self._desc(array) for array in outputs],
            [array.ctypes.data for array in arrays],
            [array.ctypes.data for array in outputs],
            0,
            0,
        )
        return tuple(outputs)

    def _desc(self, array: np.ndarray[Any, Any]) -> Any:
        linear = self.trt.TensorFormat.LINEAR
        return SimpleNamespace(dims=array.shape, type=getattr(self.trt, str(array.dtype)), format=linear)
