"""Graph weight inputs and the checkpoint tensors they are bound to, by pattern.

Source: design section 5. Weights never enter the graph: a binding names tensors and a layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from v4graph.config import Layer, ModelConfig
from v4graph.inventory import (
    Role,
    StoredTensor,
    TensorSpec,
    layer_tensors,
    model_tensors,
    mtp_tensors,
    stored,
)
from v4graph.manifest import Binding, Layout, Unbound
from v4graph_export.flavour import Flavour

LAYER_PREFIX = "layers.{i}."


@dataclass(frozen=True)
class _Form:
    """How one stored tensor reaches the graph."""

    layout: tuple[Layout, ...]
    dtype: str
    shape: tuple[int, ...]


def layer_bindings(config: ModelConfig, layer: Layer, flavour: Flavour) -> tuple[Binding, ...]:
    """Return the weight inputs of one layer, with names relative to the layer, in input order."""
    specs = layer_tensors(config, layer)
    return tuple(binding for spec in specs for binding in _bind(spec, flavour, config.n_routed_experts))


def model_bindings(config: ModelConfig, flavour: Flavour) -> tuple[Binding, ...]:
    """Return every weight input: the model-wide ones, then those of the layers by pattern."""
    layers_of: dict[Binding, list[int]] = {}
    for i, layer in enumerate(config.layers):
        for binding in layer_bindings(config, layer, flavour):
            layers_of.setdefault(binding, []).append(i)
    patterns = [_with_prefix(binding, tuple(layers)) for binding, layers in layers_of.items()]
    return (*head_bindings(config, flavour), *patterns)


def head_bindings(config: ModelConfig, flavour: Flavour) -> tuple[Binding, ...]:
    """Return the weight inputs of the embedding and the head."""
    specs = model_tensors(config)
    return tuple(binding for spec in specs for binding in _bind(spec, flavour, config.n_routed_experts))


def unbound(config: ModelConfig, flavour: Flavour) -> tuple[Unbound, ...]:
    """Return the tensors of the multi-token prediction modules, which no graph reads yet."""
    entries = []
    for k in range(len(config.mtp_layers)):
        tensors = list(_expand(mtp_tensors(config, k), flavour, config.n_routed_experts))
        entries.append(Unbound(f"mtp.{k}.*", len(tensors), sum(tensor.nbytes for tensor in tensors)))
    return tuple(entries)


def _expand(specs: Iterable[TensorSpec], flavour: Flavour, experts: int) -> Iterator[StoredTensor]:
    for spec in specs:
        for tensor in stored(spec, flavour.weights):
            yield from [tensor] * (experts if "{e}" in tensor.name else 1)


def _with_prefix(binding: Binding, layers: tuple[int, ...]) -> Binding:
    return replace(
        binding,
        input=LAYER_PREFIX + binding.input,
        tensor=LAYER_PREFIX + binding.tensor,
        scale=LAYER_PREFIX + binding.scale if binding.scale else "",
        layers=layers,
    )


def _bind(spec: TensorSpec, flavour: Flavour, experts: int) -> Iterator[Binding]:
    count = experts if "{e}" in spec.name else 0
    weight, *scales = stored(spec, flavour.weights)
    if scales and not flavour.quantised:
        layout: tuple[Layout, ...] = ("dequantise",)
        yield _binding(weight, _Form(layout, "float32", spec.shape), count, scale=scales[0].name)
        return
    for tensor in (weight, *scales):
        yield _binding(tensor, _form(tensor, spec.role, flavour), count)


def _form(tensor: StoredTensor, role: Role, flavour: Flavour) -> _Form:
    if tensor.dtype in ("F8_E4M3", "F8_E8M0"):
        return _Form(("bytes",), "int8", tensor.shape)
    if tensor.dtype == "I8":
        return _Form(("as-is",), "int8", tensor.shape)
    if tensor.dtype == "I64":
        return _Form(("as-is",), "int64", tensor.shape)
    if role is Role.F32 or tensor.name.endswith(".scale"):
        return _Form(("as-is",), "float32", tensor.shape)
    # Matrices stay as stored. Vectors (norms) are a few kB; float32 graphs take them in float32.
    matrix = len(tensor.shape) > 1 and flavour.weights.plain == "bfloat16"
    if flavour.dtype == "bfloat16" or matrix:
        return _Form(("as-is",), "bfloat16", tensor.shape)
    return _Form(("cast",), "float32", tensor.shape)


def _binding(tensor: StoredTensor, form: _Form, experts: int, scale: str = "") -> Binding:
    layout, shape = form.layout, form.shape
    if experts:
        steps = tuple(step for step in layout if step != "as-is")
        layout, shape = (*steps, "stack"), (experts, *shape)
    return Binding(
        input=tensor.name.replace("experts.{e}.", "experts."),
        tensor=tensor.name,
        layers=(),
        experts=experts,
        dtype=form.dtype,
        shape=shape,
        layout=layout,
        stored_dtype=tensor.dtype,
        scale=scale,
    )
