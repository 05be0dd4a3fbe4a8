"""Runs a lowered graph on a GPU without TensorRT: custom ops by their plugins' enqueue, the rest in torch.

What TensorRT does around plugins - shapes, dtypes, aliases, workspace, addresses - is done here the same way,
so a whole model's launches run, or are captured as one CUDA graph, where no TensorRT is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from plugin_types import PluginTypes, plugin_fields
from torch import Tensor

from v4graph.ops import OPS_BY_NAME, OpSpec
from v4graph_plugins.catalogue import PLUGIN_OPS
from v4graph_plugins.launcher import Launcher
from v4graph_plugins.plugin import Findings, plugin_classes

Values = dict[str, Tensor]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class GpuGraph:
    """A lowered graph; states in the feeds are updated in place. Shapes and constants stay on the host."""

    def __init__(self, lowered: bytes, launcher: Launcher, device: str = "cuda") -> None:
        model = onnx.load_from_string(lowered)
        findings = Findings()
        findings.launcher, self.device = launcher, device
        creators = {spec.name: plugin_classes(PluginTypes, findings)[1](spec) for spec in PLUGIN_OPS}
        self.nodes, self.outputs = list(model.graph.node), [value.name for value in model.graph.output]
        self.constants = {
            one.name: torch.from_numpy(numpy_helper.to_array(one).copy()).to(device)
            for one in model.graph.initializer
        }
        self.plugins = {
            node.name: creators[node.op_type].create_plugin(node.name, plugin_fields(_attributes(node)), None)
            for node in self.nodes
            if node.op_type in OPS_BY_NAME
        }
        self._moved: dict[str, tuple[Tensor, Tensor]] = {}

    def run(self, feeds: Mapping[str, Tensor]) -> Values:
        """Return the outputs by name."""
        values: Values = {**self.constants, **feeds}
        for node in self.nodes:
            inputs = [values[name] for name in node.input]
            if node.name in self.plugins:
                here = [self._on_device(*pair) for pair in zip(node.input, inputs, strict=True)]
                results = self._enqueue(self.plugins[node.name], here)
            else:
                results = [self._native(node, inputs)]
            values |= zip(node.output, results, strict=True)
        return {name: values[name] for name in self.outputs}

    def capture(self, feeds: Mapping[str, Tensor]) -> tuple[Callable[[], None], Values]:
        """Return a replay of one run as a CUDA graph, and its outputs, which each replay overwrites."""
        self.run(feeds)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.run(feeds)
        return graph.replay, outputs

    def _enqueue(self, plugin: Any, inputs: list[Tensor]) -> list[Tensor]:
        spec: OpSpec = plugin.spec
        given, inputs = inputs, [tensor.contiguous() for tensor in inputs]
        descs = [_desc(tensor) for tensor in inputs]
        named = {port.name: tuple(t.shape) for port, t in zip(spec.inputs, inputs, strict=True)}
        outputs = []
        types = plugin.get_output_data_types([desc.type for desc in descs])
        for i, shape in enumerate(spec.output_shapes(named, plugin.attributes)):
            source = plugin.get_aliased_input(i)
            assert source < 0 or inputs[source] is given[source], "a state has to be dense from the start"
            kind = getattr(torch, types[i].value)
            outputs.append(
                inputs[source] if source >= 0 else torch.empty(shape, dtype=kind, device=self.device)
            )
        largest = [SimpleNamespace(max=desc.dims, desc=desc) for desc in descs]
        scratch = torch.empty(plugin.get_workspace_size(largest, []), dtype=torch.uint8, device=self.device)
        plugin.on_shape_change(descs, [])
        stream = torch.cuda.current_stream().cuda_stream if self.device == "cuda" else 0
        addresses = [[tensor.data_ptr() for tensor in part] for part in (inputs, outputs)]
        plugin.enqueue(descs, [_desc(one) for one in outputs], *addresses, scratch.data_ptr(), stream)
        return outputs

    def _native(self, node: onnx.NodeProto, inputs: list[Tensor]) -> Tensor:
        """Compute a node of the embedding or the head."""
        devices = {tensor.device.type for tensor in inputs if tensor.dim()}
        if node.op_type == "Concat" and len(devices) > 1:
            inputs = [self._on_device(*pair) for pair in zip(node.input, inputs, strict=True)]
        result: Tensor = _NATIVE[node.op_type](inputs, _attributes(node))
        return result

    def _on_device(self, name: str, tensor: Tensor) -> Tensor:
        """Copy what was computed on the host once: a capture allows no such copy."""
        if tensor.device.type == self.device:
            return tensor
        kept = self._moved.get(name)
        if kept is None or not torch.equal(kept[0], tensor):
            kept = self._moved[name] = (tensor, tensor.to(self.device))
        return kept[1]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _desc(tensor: Tensor) -> Any:
    kind = getattr(PluginTypes, _dtype(tensor))
    return SimpleNamespace(dims=tuple(tensor.shape), type=kind, format=PluginTypes.TensorFormat.LINEAR)


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.reshape(-1)]


def _unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    for axis in _ints(axes):
        x = x.unsqueeze(axis)
    return x


def _broadcast(shape: tuple[int, ...], wanted: list[int]) -> tuple[int, ...]:
    return tuple(np.broadcast_shapes(shape, tuple(wanted)))


def _gather_nd(x: Tensor, index: Tensor) -> Tensor:
    return x[tuple(index.to(x.device)[..., i] for i in range(index.shape[-1]))]


def _shape(x: Tensor, attributes: Mapping[str, Any]) -> Tensor:
    return torch.tensor(x.shape, device="cpu")[attributes.get("start", 0) : attributes.get("end")]


_NATIVE: Mapping[str, Callable[[list[Tensor], Mapping[str, Any]], Tensor]] = {
    "Constant": lambda x, a: torch.from_numpy(numpy_helper.to_array(a["value"]).copy()),
    "Unsqueeze": lambda x, a: _unsqueeze(*x),
    "Squeeze": lambda x, a: x[0].squeeze(),
    "Expand": lambda x, a: torch.broadcast_to(x[0], _broadcast(x[0].shape, _ints(x[1]))),
    "Concat": lambda x, a: torch.cat(x, a["axis"]),
    "Gather": lambda x, a: x[0].select(a["axis"], int(x[1])),
    "GatherND": lambda x, a: _gather_nd(*x),
    "Shape": lambda x, a: _shape(x[0], a),
    "Cast": lambda x, a: x[0].to({1: torch.float32, 7: torch.int64, 16: torch.bfloat16}[a["to"]]),
    "Sub": lambda x, a: x[0] - x[1],
    "Clip": lambda x, a: x[0].clamp(min=int(x[1])),
    "Range": lambda x, a: torch.arange(*(int(value) for value in x), device="cpu"),
}
