"""What TensorRT would refuse in a lowered graph, or accept and get wrong, found before it is asked.

Every finding names the node, its layer kind and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph.ops import DOMAIN, OpSpec
from v4graph.passes.facts import custom_nodes, plain_name, where
from v4graph.targets import ARCHITECTURES, PORTABLE, holding

_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
}
_NATIVE = {ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.FLOAT4E2M1: "fp4"}
_EXPORT = "export it again with `v4graph export`"


def check_versions(model: ir.Model, ops: Mapping[str, int], plugins: Mapping[str, int]) -> None:
    """Refuse ops (name -> version in `ops`) whose plugin is of another version.

    Raises:
        EngineError: names the first node of such an op.
    """
    for node, spec in custom_nodes(model):
        wanted, there = ops.get(spec.name, spec.version), plugins.get(spec.name)
        if there is not None and wanted != there:
            newer = "upgrade v4graph" if wanted > there else _EXPORT
            raise EngineError(
                f"{where(node)}: needs {spec.name} version {wanted}, the plugin library has version {there}; "
                f"{newer}, or leave the op to its body with --no-plugin {spec.name}."
            )


def check_unknown(model: ir.Model) -> None:
    """Refuse ops of our domain that are neither in the catalogue nor functions of the model.

    Raises:
        EngineError: names the first such node.
    """
    known = {spec.name for _, spec in custom_nodes(model)}
    for node in model.graph:
        name = plain_name(node.op_type)
        if node.domain == DOMAIN and name not in known and node.op_identifier() not in model.functions:
            raise EngineError(
                f"{where(node)}: this v4graph has no op {node.op_type} and the graph no body of it; "
                f"{_EXPORT}, or upgrade v4graph."
            )


def check_dtypes(model: ir.Model) -> None:
    """Refuse a custom op that reads a tensor of another dtype than its port takes.

    Dtypes are those of graph inputs and initializers, carried on through the outputs of custom ops.

    Raises:
        EngineError: names the first node, port and tensor.
    """
    for node, spec in custom_nodes(model):
        if len(node.inputs) != len(spec.inputs) or len(node.outputs) != len(spec.outputs):
            raise EngineError(
                f"{where(node)}: has {len(node.inputs)} inputs and {len(node.outputs)} outputs, "
                f"{spec.name} has {len(spec.inputs)} and {len(spec.outputs)}; {_EXPORT}."
            )
        chosen = ""
        for port, value in zip(spec.inputs, node.inputs, strict=True):
            dtype = _dtype(value)
            if dtype is None:
                continue
            expected = (chosen,) if chosen and port.is_float else port.dtypes
            if dtype not in expected:
                raise EngineError(
                    f"{where(node)}: input '{port.name}' is {value.name if value else ''} of type {dtype}, "
                    f"expected {' or '.join(expected)}; {_EXPORT}."
                )
            chosen = dtype if port.is_float else chosen
        _mark_outputs(node, spec, chosen)


def check_states(model: ir.Model, manifest: Manifest) -> None:
    """Refuse state inputs whose shape is not the manifest's, which makes the profiles.

    Raises:
        EngineError: names the first node that reads such a state.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    for state in manifest.states:
        for layer in state.layers:
            name = state.name.replace("{i}", str(layer))
            value = inputs.get(name)
            if value is None:
                raise EngineError(f"{name}: the manifest has this state, the graph has not; {_EXPORT}.")
            got = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]
            if got != list(state.shape):
                reader = next((where(node) + ": " for node, _ in value.uses()), "")
                raise EngineError(
                    f"{reader}state '{name}' has shape {got}, the manifest says {list(state.shape)}; "
                    f"{_EXPORT}."
                )


def _dtype(value: ir.Value | None) -> str | None:
    if value is None or value.dtype is None:
        return None
    return _NAMES.get(value.dtype, value.dtype.name.lower())


def _mark_outputs(node: ir.Node, spec: OpSpec, chosen: str) -> None:
    types = {name: dtype for dtype, name in _NAMES.items()}
    for port, value in zip(spec.outputs, node.outputs, strict=True):
        name = chosen if port.is_float else port.dtypes[0]
        if name and value.dtype is None:
            value.dtype = types[name]


def native_types(model: ir.Model) -> dict[str, str]:
    """Return each quantised tensor type ("fp8", "fp4") with the name of the first tensor of it."""
    found: dict[str, str] = {}
    for value in _values(model):
        kind = _NATIVE.get(value.dtype) if value.dtype is not None else None
        if kind is not None:
            found.setdefault(kind, value.name or "")
    return found


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def check_targets(model: ir.Model, targets: Sequence[str]) -> None:
    """Refuse native FP8 and FP4 tensors on targets whose tensor cores do not read them.

    Raises:
        EngineError: names the tensor, the target and the alternatives.
    """
    types = native_types(model)
    if not types:
        return
    tensor, kinds = next(iter(types.values())), " and ".join(kind.upper() for kind in types)
    able = holding(types, ARCHITECTURES)
    for target in targets:
        if target == PORTABLE or target not in able:
            title = "every GPU since Ampere" if target == PORTABLE else ARCHITECTURES[target].title
            raise EngineError(
                f"--target {target}: tensor '{tensor}' is native {kinds}, which {title} cannot hold; "
                f"build for {', '.join(able)}, or export with INT8 carriers (the default of "
                "`v4graph export`), which build for every target."
            )
