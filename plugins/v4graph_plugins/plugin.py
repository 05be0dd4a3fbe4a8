"""Every custom op as a TensorRT plugin, from its OpSpec: types, formats, shapes, fields, aliases.

One class serves all ops. It is made per TensorRT module, because its bases live there.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from v4graph.errors import EngineError
from v4graph.ops import OpSpec
from v4graph_plugins.expressions import Dim, expression
from v4graph_plugins.kernel_launcher import plan_workspace
from v4graph_plugins.launcher import DeviceTensor, Launcher, OpCall

# Our names of dtypes are TensorRT's.
DTYPES = ("float32", "bfloat16", "int8", "int32", "int64")


class Findings:
    """What plugins of this process found wrong, as sentences; TensorRT only reports that they failed.

    `launcher` runs their calls; it is set before an engine runs.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.launcher: Launcher | None = None

    def fail(self, text: str) -> EngineError:
        """Note a finding and return the error to raise."""
        if text not in self.texts:
            self.texts.append(text)
        return EngineError(text)

    def take(self) -> list[str]:
        """Return the findings so far and forget them."""
        texts, self.texts = self.texts, []
        return texts


def output_types(spec: OpSpec, types: Sequence[str], where: str, findings: Findings) -> list[str]:
    """Return the dtype names of the outputs; `types` are those of the inputs.

    Raises:
        EngineError: an input has a dtype that its port does not take.
    """
    chosen = ""
    for port, dtype in zip(spec.inputs, types, strict=True):
        expected = (chosen,) if chosen and port.is_float else port.dtypes
        if dtype not in expected:
            raise findings.fail(
                f"{where}: input '{port.name}' is {dtype}, expected {' or '.join(expected)}; "
                "export the graph again with `v4graph export`."
            )
        chosen = dtype if port.is_float else chosen
    return [chosen if port.is_float else port.dtypes[0] for port in spec.outputs]


def check_shapes(spec: OpSpec, shapes: Sequence[tuple[int, ...]], where: str, findings: Findings) -> None:
    """Refuse input shapes that do not fit the ports: every symbol has one size.

    Raises:
        EngineError: names the port, the shape got and the one expected.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for port, shape in zip(spec.inputs, shapes, strict=True):
        fits = len(shape) == len(port.dims)
        for dim, size in zip(port.dims, shape, strict=False):
            if dim.isdigit():
                fits &= size in (int(dim), -1)
            elif dim.isidentifier() and size >= 0:
                fits &= sizes.setdefault(dim, (size, port.name))[0] == size
        if not fits:
            known = ", ".join(
                f"{dim} = {sizes[dim][0]} ({sizes[dim][1]})" for dim in port.dims if dim in sizes
            )
            raise findings.fail(
                f"{where}: input '{port.name}' has shape {list(shape)}, expected [{', '.join(port.dims)}]"
                f"{' with ' + known if known else ''}; export the graph again with `v4graph export`."
            )


def parse_fields(spec: OpSpec, fields: Sequence[Any], where: str, findings: Findings) -> dict[str, Any]:
    """Return the attributes in PluginFields (INT32, FLOAT32, or CHAR with a NUL at the end).

    Raises:
        EngineError: an attribute is missing.
    """
    data = {field.name: np.asarray(field.data).ravel() for field in fields}
    for name in spec.attributes:
        if name not in data or not data[name].size:
            raise findings.fail(
                f"{where}: attribute '{name}' of {spec.name} is missing; export the graph again with "
                "`v4graph export`."
            )
    return {
        name: data[name].astype(np.int8).tobytes().rstrip(b"\0").decode()
        if kind is str
        else kind(data[name][0])
        for name, kind in spec.attributes.items()
    }


def _field_arrays(spec: OpSpec, attributes: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: np.frombuffer(attributes[name].encode() + b"\0", np.int8).copy()
        if kind is str
        else np.array([attributes[name]], np.int32 if kind is int else np.float32)
        for name, kind in spec.attributes.items()
    }


@functools.cache
def plugin_classes(trt: Any, findings: Findings) -> tuple[type[Any], type[Any]]:
    """Return the plugin class and the creator class for one TensorRT module."""
    field_types = {
        int: trt.PluginFieldType.INT32,
        float: trt.PluginFieldType.FLOAT32,
        str: trt.PluginFieldType.CHAR,
    }
    to_trt = {name: getattr(trt, name) for name in DTYPES}
    from_trt = {dtype: name for name, dtype in to_trt.items()}
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime)

    def name_of(dtype: Any) -> str:
        return from_trt.get(dtype, str(dtype).rpartition(".")[2])

    def _tensors(addresses: Sequence[int], descs: Sequence[Any]) -> list[DeviceTensor]:
        return [
            DeviceTensor(int(address), tuple(desc.dims), name_of(desc.type))
            for address, desc in zip(addresses, descs, strict=True)
        ]

    class V4Plugin(*bases):  # type: ignore[misc]
        """One node. TensorRT clones it freely, so it holds no state but its attributes and its place."""

        def __init__(self, spec: OpSpec, attributes: Mapping[str, Any], where: str) -> None:
            for base in bases:
                base.__init__(self)
            self.spec, self.attributes, self.where = spec, attributes, where
            self.plugin_name, self.plugin_version = spec.name, str(spec.version)
            self.plugin_namespace, self.num_outputs = "", len(spec.outputs)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> V4Plugin:
            return V4Plugin(self.spec, self.attributes, self.where)

        def attach_to_context(self, context: Any) -> V4Plugin:
            return self.clone()

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            names = [name_of(dtype) for dtype in input_types]
            return [to_trt[name] for name in output_types(self.spec, names, self.where, findings)]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Any, builder: Any) -> list[Any]:
            dims = [tuple(Dim.of(trt, builder, dim) for dim in shape) for shape in inputs]
            static = [tuple(dim if isinstance(dim, int) else -1 for dim in shape) for shape in dims]
            check_shapes(self.spec, static, self.where, findings)
            named = dict(zip((port.name for port in self.spec.inputs), dims, strict=True))
            shapes = self.spec.output_shapes(named, self.attributes)
            return [trt.DimsExprs([expression(builder, dim) for dim in shape]) for shape in shapes]

        def get_fields_to_serialize(self) -> Any:
            # TensorRT reads the arrays after this call, so the plugin keeps them.
            self.serialized = _field_arrays(self.spec, self.attributes)
            fields = [
                trt.PluginField(name, array, field_types[self.spec.attributes[name]])
                for name, array in self.serialized.items()
            ]
            return trt.PluginFieldCollection(fields)

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            ports = (*self.spec.inputs, *self.spec.outputs)
            desc, port = tensors[position].desc, ports[position]
            if desc.format != trt.TensorFormat.LINEAR or name_of(desc.type) not in port.dtypes:
                return False
            floats = [i for i in range(position) if ports[i].is_float]
            return not (port.is_float and floats) or desc.type == tensors[floats[0]].desc.type

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            for bound in ("min", "opt", "max"):
                shapes = [tuple(getattr(tensor, bound)) for tensor in inputs]
                check_shapes(self.spec, shapes, self.where, findings)

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            check_shapes(self.spec, [tuple(desc.dims) for desc in inputs], self.where, findings)

        def get_aliased_input(self, output: int) -> int:
            alias = self.spec.outputs[output].alias
            return [port.name for port in self.spec.inputs].index(alias) if alias else -1

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            return

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            # From the launch plan, whatever runs here: the engine may run where kernels do.
            shapes = [tuple(tensor.max) for tensor in inputs]
            dtypes = [name_of(tensor.desc.type) for tensor in inputs]
            return plan_workspace(self.spec, self.attributes, shapes, dtypes)

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            if findings.launcher is None:
                raise findings.fail(f"{self.where}: no launcher was set, so {self.spec.name} cannot run.")
            call = OpCall(
                self.spec,
                self.attributes,
                _tensors(inputs, input_desc),
                _tensors(outputs, output_desc),
                int(workspace),
                int(stream),
            )
            findings.launcher.launch(call)

    class V4Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """Makes the plugins of one op, from a node's attributes or from a plan."""

        def __init__(self, spec: OpSpec) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.spec = spec
            self.name, self.plugin_version, self.plugin_namespace = spec.name, str(spec.version), ""
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, np.array([]), field_types[kind])
                    for name, kind in spec.attributes.items()
                ]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            where = name or self.spec.name
            return V4Plugin(self.spec, parse_fields(self.spec, list(fields), where, findings), where)

    return V4Plugin, V4Creator
