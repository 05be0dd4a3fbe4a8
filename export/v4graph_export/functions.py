"""torch.export programs to ONNX functions: no initializers, no dead metadata, canonical names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from v4graph.ops import DOMAIN, OPSET
from v4graph_export.registration import TORCH_DTYPES, translation_table

OPSETS = {"": OPSET, DOMAIN: 1}


@dataclass(frozen=True)
class FakeInput:
    """One tensor input of a trace: its dtype and its sizes, with the axes that stay symbolic."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    symbolic: tuple[int, ...]


class _Module(torch.nn.Module):
    """Wraps a function of flat arguments for torch.export."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def trace(
    function: Callable[..., Any],
    inputs: Sequence[FakeInput],
    outputs: Sequence[str],
    parameters: Mapping[str, int | float] | None = None,
) -> ir.Model:
    """Trace `function(*inputs, *parameters)` on fake tensors into an ONNX model.

    Weights are arguments, so nothing is allocated. `parameters` are examples of scalar arguments;
    ints are traced as symbols, floats as 0-d tensors, and both become graph inputs.

    Raises:
        AssertionError: torch.export specialised a symbolic size (an example size is too small).
    """
    parameters = parameters or {}
    dynamic = torch.export.Dim.DYNAMIC
    with FakeTensorMode():
        examples: list[Any] = [torch.empty(i.shape, dtype=TORCH_DTYPES[i.dtype]) for i in inputs]
        examples += [torch.tensor(v) if isinstance(v, float) else v for v in parameters.values()]
    shapes: list[Any] = [dict.fromkeys(i.symbolic, dynamic) or None for i in inputs]
    shapes += [None if isinstance(v, float) else dynamic for v in parameters.values()]
    with warnings.catch_warnings(), _QuietLoggers("torch.onnx", "torch.export"):
        warnings.simplefilter("ignore")
        program = torch.export.export(
            _Module(function), tuple(examples), dynamic_shapes={"arguments": tuple(shapes)}, strict=False
        )
        bounded = {k: v for k, v in program.range_constraints.items() if "int_oo" not in str(v)}
        assert not bounded, f"torch.export specialised {bounded}: use larger example sizes"
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[*(i.name for i in inputs), *parameters],
            output_names=list(outputs),
            custom_translation_table=translation_table(),
        )
    assert exported is not None
    return exported.model


class _QuietLoggers:
    """Silences the progress and version notes of torch's exporter loggers."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)


def walk(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Yield every node of a graph and of its subgraphs."""
    yield from ir.traversal.RecursiveGraphIterator(graph)


def to_function(model: ir.Model, name: str, attributes: Mapping[str, type] | None = None) -> ir.Function:
    """Turn a traced model into a function; inputs named in `attributes` become its attributes."""
    graph = model.graph
    _inline_initializers(graph)
    declared = _inputs_to_attributes(graph, attributes or {})
    canonicalise(graph)
    graph.opset_imports.clear()
    graph.opset_imports.update(OPSETS)
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=declared)


def _inline_initializers(graph: ir.Graph) -> None:
    """Functions have no initializers: make each a Constant node at the front."""
    for key, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(key)
            continue
        assert value.const_value is not None
        node = ir.node("Constant", [], {"value": ir.tensor(value.const_value.numpy(), name="")})
        graph.insert_before(graph[0], node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        graph.initializers.pop(key)


def _inputs_to_attributes(graph: ir.Graph, attributes: Mapping[str, type]) -> list[ir.Attr]:
    """Replace scalar inputs by Constant nodes that refer to a function attribute."""
    kinds = {
        int: ("value_int", ir.AttributeType.INT),
        float: ("value_float", ir.AttributeType.FLOAT),
        str: ("value_string", ir.AttributeType.STRING),
    }
    by_name = {value.name: value for value in graph.inputs}
    for name, kind in attributes.items():
        value = by_name.get(name)
        if value is None:
            continue
        key, onnx_kind = kinds[kind]
        node = ir.Node("", "Constant", [], [ir.RefAttr(key, name, onnx_kind)])
        graph.insert_before(graph[0], node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        graph.inputs.remove(value)
    return [ir.Attr(name, kinds[kind][1], None) for name, kind in attributes.items()]


def canonicalise(graph: ir.Graph) -> None:
    """Drop names, shapes and notes that a trace leaves, so equal programs give equal bytes."""
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}
    graph.metadata_props.clear()
    graph.doc_string = None
    for value in graph.inputs:
        value.metadata_props.clear()
    count = 0
    for node in walk(graph):
        node.metadata_props.clear()
        node.doc_string = None
        node.name = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.shape = None
            value.type = None
            if id(value) not in kept:
                value.name = f"v{count}"
                count += 1
