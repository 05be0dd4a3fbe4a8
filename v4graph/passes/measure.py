"""What a graph does for one step: its nodes by layer, with shapes, bytes, FLOPs and kernel launches.

Shapes come from walking the graph with arrays that take no memory. Custom ops are counted by their launch
plans and cost formulas; any other node outside a body is a native layer of TensorRT: one launch that reads
and writes as many bytes as it puts out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from v4graph.errors import EngineError
from v4graph.launch import PLANS
from v4graph.launch.calls import Call
from v4graph.launch.cost import COSTS
from v4graph.ops import DOMAIN, OPS_BY_NAME, OPSET
from v4graph.passes.facts import KIND, LAYER, LAYER_PREFIX, plain_name

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Step:
    """One call of a model: `batch` slots with `tokens` new tokens each.

    `context` tokens lie before them, in caches that hold `capacity`.
    """

    batch: int = 1
    tokens: int = 1
    context: int = 0
    capacity: int = 8192


@dataclass(frozen=True)
class Tensor:
    """A tensor of a node: its name in the checkpoint or the graph, its dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _dtype(self.dtype).itemsize


@dataclass(frozen=True)
class NodeFacts:
    """One node: `op` without tag; `launches` is None for a custom op that has no kernels for these shapes."""

    name: str
    op: str
    custom: bool
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, int | float | str]
    bytes: int
    flops: int
    launches: int | None


@dataclass(frozen=True)
class Block:
    """One part of the model: "embed", "layers.0" ... or "head", and its kind, such as "csa_topk"."""

    name: str
    kind: str
    nodes: tuple[NodeFacts, ...]

    @property
    def bytes(self) -> int:
        """Bytes that the step moves here."""
        return sum(node.bytes for node in self.nodes)

    @property
    def flops(self) -> int:
        """FLOPs of the step here."""
        return sum(node.flops for node in self.nodes)

    @property
    def launches(self) -> int | None:
        """Kernel launches of the step here; None if an op has no kernels."""
        return sum_launches(node.launches for node in self.nodes)

    @property
    def custom(self) -> int:
        """Number of custom ops."""
        return sum(node.custom for node in self.nodes)


def sum_launches(counts: Iterable[int | None]) -> int | None:
    """Return the sum, None if any is unknown."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


def measure(model: ir.Model, step: Step) -> list[Block]:
    """Return the parts of a model in order; equal layers share their nodes.

    `model` may have its layers as function calls or inlined. Symbolic dimensions are B, S and C<ratio>, the
    rows of a cache that has one for <ratio> tokens.

    Raises:
        EngineError: a node whose shapes cannot be found, or another symbolic dimension.
    """
    return list(_Walk(model, step).blocks())


def _dtype(name: str) -> np.dtype[Any]:
    return _DTYPES[name] if name in _DTYPES else np.dtype(name)


def _empty(shape: Iterable[int], dtype: np.dtype[Any]) -> Array:
    """An array of zeros that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


class _Walk:
    def __init__(self, model: ir.Model, step: Step) -> None:
        self._model, self._step = model, step
        self._known: dict[Any, tuple[tuple[NodeFacts, ...], list[Array]]] = {}

    def blocks(self) -> Iterator[Block]:
        graph = self._model.graph
        arrays: dict[ir.Value, Array] = {value: self._input(value) for value in graph.inputs}
        for value in graph.initializers.values():
            assert value.const_value is not None
            arrays[value] = value.const_value.numpy()
        parts: dict[str, tuple[str, list[NodeFacts]]] = {}
        for node in graph:
            layer, kind = _place(node)
            found, outputs = self._node(node, arrays)
            arrays |= zip(node.outputs, outputs, strict=True)
            parts.setdefault(layer, (kind, []))[1].extend(found)
        for name, (kind, nodes) in parts.items():
            yield Block(name, kind, tuple(nodes))

    def _input(self, value: ir.Value) -> Array:
        if value.shape is None or value.dtype is None:
            raise EngineError(f"graph input '{value.name}' has no shape; export the graph again.")
        return _empty((self._dim(value, dim) for dim in value.shape), value.dtype.numpy())

    def _dim(self, value: ir.Value, dim: int | ir.SymbolicDim) -> int:
        if isinstance(dim, int):
            return dim
        name = str(dim.value)
        sizes = {"B": self._step.batch, "S": self._step.tokens}
        if name in sizes:
            return sizes[name]
        if name.startswith("C") and name[1:].isdigit():
            return self._step.capacity // int(name[1:])
        raise EngineError(
            f"graph input '{value.name}' has a dimension '{name}', expected B, S or C<ratio>; export it "
            "again."
        )

    def _node(
        self, node: ir.Node, arrays: Mapping[ir.Value, Array]
    ) -> tuple[tuple[NodeFacts, ...], list[Array]]:
        """Return the facts of a node, or of the function that it calls, and its outputs."""
        inputs = [None if value is None else arrays[value] for value in node.inputs]
        spec = OPS_BY_NAME.get(plain_name(node.op_type)) if node.domain == DOMAIN else None
        function = self._model.functions.get(node.op_identifier())
        if spec is None and function is not None:
            key = (node.op_identifier(), *((a.shape, a.dtype) for a in inputs if a is not None))
            if key not in self._known:
                self._known[key] = self._function(function, [a for a in inputs if a is not None])
            return self._known[key]
        outputs = _run(node, inputs) if spec is None else _custom_outputs(node, inputs)
        return (self._facts(node, inputs, outputs),), outputs

    def _facts(self, node: ir.Node, inputs: list[Array | None], outputs: list[Array]) -> NodeFacts:
        op = plain_name(node.op_type)
        read, written = _tensors(node.inputs, inputs), _tensors(node.outputs, outputs)
        attributes = _attributes(node)
        if op not in PLANS or node.domain != DOMAIN:
            # Native, or a custom op that has a body only: it may become any number of layers.
            custom = node.domain == DOMAIN
            launches = None if custom else int(node.op_type != "Constant")
            nbytes = 2 * sum(tensor.nbytes for tensor in written)
            return NodeFacts(node.name or "", op, custom, read, written, {}, nbytes, 0, launches)
        spec = OPS_BY_NAME[op]
        shapes = {port.name: tensor.shape for port, tensor in zip(spec.inputs, read, strict=True)}
        call = Call(op, node.name or "", spec.bind_shapes(shapes), attributes)
        nbytes, flops = COSTS[op].of(call, self._step.context)
        try:
            launches = len(call.launches(PLANS).launches)
        except EngineError:
            launches = None
        return NodeFacts(node.name or "", op, True, read, written, attributes, nbytes, flops, launches)

    def _function(
        self, function: ir.Function, inputs: list[Array]
    ) -> tuple[tuple[NodeFacts, ...], list[Array]]:
        arrays = dict(zip(function.inputs, inputs, strict=True))
        found: list[NodeFacts] = []
        for node in function:
            nodes, outputs = self._node(node, arrays)
            arrays |= zip(node.outputs, outputs, strict=True)
            found += nodes
        return tuple(found), [arrays[value] for value in function.outputs]


def _place(node: ir.Node) -> tuple[str, str]:
    """Return the part of the model that a node of the top level belongs to, and its kind."""
    if LAYER in node.metadata_props:
        return node.metadata_props[LAYER], node.metadata_props[KIND]
    name = node.name or node.op_type
    return name, node.op_type.removeprefix(LAYER_PREFIX)


def _custom_outputs(node: ir.Node, inputs: list[Array | None]) -> list[Array]:
    spec = OPS_BY_NAME[plain_name(node.op_type)]
    given = [array for array in inputs if array is not None]
    shapes = {port.name: array.shape for port, array in zip(spec.inputs, given, strict=True)}
    chosen = next(
        (a.dtype for p, a in zip(spec.inputs, given, strict=True) if p.is_float),
        np.dtype("float32"),
    )
    return [
        _empty(shape, chosen if port.is_float else _dtype(port.dtypes[0]))
        for port, shape in zip(spec.outputs, spec.output_shapes(shapes, _attributes(node)), strict=True)
    ]


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items() if not attribute.is_ref()}


def _run(node: ir.Node, inputs: list[Array | None]) -> list[Array]:
    """Run a native node on zeros."""
    values = [None if a is None else ir.Value(name=f"x{i}") for i, a in enumerate(inputs)]
    alone = ir.Node(
        node.domain,
        node.op_type,
        values,
        list(node.attributes.values()),
        outputs=[ir.Value(name=f"y{i}") for i in range(len(node.outputs))],
    )
    named = [v for v in values if v is not None]
    graph = ir.Graph(named, alone.outputs, nodes=[alone], opset_imports={"": OPSET}, name="one")
    for value, array in zip(values, inputs, strict=True):
        if value is not None and array is not None:
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.shape = ir.Shape(array.shape)
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    try:
        found = ReferenceEvaluator(_untyped(proto)).run(None, feeds)
    except Exception as error:  # operators raise what their implementations raise
        raise EngineError(f"{node.name or node.op_type}: its shapes cannot be found ({error}).") from error
    return list(found)


def _untyped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Outputs without a type get any: the evaluator does not look."""
    for value in proto.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return proto


def _tensors(values: Iterable[ir.Value | None], arrays: Iterable[Array | None]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(value.name or "", str(array.dtype), array.shape)
        for value, array in zip(values, arrays, strict=True)
        if value is not None and array is not None
    )


def counts(blocks: Iterable[Block]) -> Counter[str]:
    """Return how often each op is there."""
    return Counter(node.op for block in blocks for node in block.nodes)
