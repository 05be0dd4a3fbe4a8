"""Replace the calls that a fused op stands for by the op.

Before: `z = V4HyperPost(y, x, post, comb)` and `h, p, c = V4HyperPre(z, fn, base, scale, norm)`. After:
`h, z, p, c = V4HyperPostPre(y, x, post, comb, fn, base, scale, norm)`. The pattern is the fused op's own
parts. Calls match where their shared values and attributes agree, where nothing else reads a value that the
fused op does not give, and where no other node lies between them. Calls of one op are taken in graph order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from v4graph.ops import DOMAIN, OPSET, OpSpec
from v4graph.ops.spec import Part
from v4graph.ops.variant import FLOAT_SCALE, variant_name
from v4graph.passes.facts import KIND, LAYER, plain_name

Values = dict[str, ir.Value]
_KINDS = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING}


class FuseOps(ir.passes.InPlacePass):
    """Fuses the calls of one fused op, in the layers and in the graph itself."""

    def __init__(self, spec: OpSpec) -> None:
        super().__init__()
        self.spec = spec

    def __repr__(self) -> str:
        return f"Fuse{self.spec.name.removeprefix('V4')}"

    @property
    def summary(self) -> str:
        """One line: what becomes what."""
        parts = ", ".join(dict.fromkeys(part.spec.name for part in self.spec.parts))
        return f"{parts} become one {self.spec.name}."

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse `model` in place."""
        bodies = {key for key in model.functions if key[0] == DOMAIN and plain_name(key[1]) != key[1]}
        graphs: list[ir.Graph | ir.Function] = [
            model.graph,
            *(f for key, f in model.functions.items() if key not in bodies),
        ]
        modified = False
        for graph in graphs:
            if isinstance(graph, ir.Function) and plain_name(graph.name) == self.spec.name:
                continue  # the fused op's own body holds the pattern
            while match := _match(self.spec, graph):
                _replace(model, self.spec, graph, *match)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _match(
    spec: OpSpec, graph: ir.Graph | ir.Function
) -> tuple[list[ir.Node], Values, dict[str, Any]] | None:
    """Return the calls of the first match, the values of all names, and the fused op's attributes."""
    by_op: dict[str, list[ir.Node]] = {}
    for node in graph:
        if node.domain == DOMAIN:
            by_op.setdefault(plain_name(node.op_type), []).append(node)
    if any(part.spec.name not in by_op for part in spec.parts):
        return None
    order = {node: i for i, node in enumerate(graph)}
    outputs = set(graph.outputs)
    for found in _candidates(spec.parts, by_op, order, [], {}, {}):
        nodes, values, _ = found
        if _closed(spec, nodes, values, outputs) and not _encloses(nodes):
            return found
    return None


def _candidates(
    parts: tuple[Part, ...],
    by_op: Mapping[str, list[ir.Node]],
    order: Mapping[ir.Node, int],
    nodes: list[ir.Node],
    values: Values,
    attributes: dict[str, Any],
) -> Iterator[tuple[list[ir.Node], Values, dict[str, Any]]]:
    """Yield every choice of calls whose values and attributes agree."""
    if len(nodes) == len(parts):
        yield nodes, values, attributes
        return
    part = parts[len(nodes)]
    same = [node for node, before in zip(nodes, parts, strict=False) if before.spec is part.spec]
    known = next((values[name] for name in part.inputs if name in values), None)
    for node in by_op[part.spec.name]:
        if known is not None and known not in node.inputs:
            continue
        if node in nodes or any(order[node] < order[before] for before in same):
            continue
        bound = _bind(part, node, values, attributes)
        if bound is not None:
            yield from _candidates(parts, by_op, order, [*nodes, node], *bound)


def _bind(
    part: Part, node: ir.Node, values: Values, attributes: Mapping[str, Any]
) -> tuple[Values, dict[str, Any]] | None:
    values, known = dict(values), dict(attributes)
    names = (*part.inputs, *part.outputs)
    for name, value in zip(names, (*node.inputs, *node.outputs), strict=True):
        if value is None or values.setdefault(name, value) is not value:
            return None
    for key, wanted in part.attributes.items():
        got = node.attributes[key].value
        if isinstance(wanted, str) and wanted.startswith("@"):
            wanted = known.setdefault(wanted[1:], got)
        if got != wanted:
            return None
    return values, known


def _closed(spec: OpSpec, nodes: list[ir.Node], values: Values, outputs: set[ir.Value]) -> bool:
    """Whether values that the fused op does not give are read by the calls alone."""
    given = {port.name for port in (*spec.inputs, *spec.outputs)}
    inner = [value for name, value in values.items() if name not in given]
    return all(value not in outputs and all(n in nodes for n, _ in value.uses()) for value in inner)


def _encloses(nodes: list[ir.Node]) -> bool:
    """Whether another node reads one of the calls and feeds another: fused, it would be a cycle."""
    queue = [n for node in nodes for value in node.outputs for n, _ in value.uses() if n not in nodes]
    seen: set[ir.Node] = set()
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        for value in node.outputs:
            for reader, _ in value.uses():
                if reader in nodes:
                    return True
                queue.append(reader)
    return False


def _replace(
    model: ir.Model,
    spec: OpSpec,
    graph: ir.Graph | ir.Function,
    nodes: list[ir.Node],
    values: Values,
    attributes: Mapping[str, Any],
) -> None:
    scale = "float32" if any(FLOAT_SCALE in node.op_type for node in nodes) else "int8"
    tagged = all(node.op_identifier() in model.functions for node in nodes)
    name = variant_name(spec, attributes, scale) if tagged else spec.name
    fused = ir.Node(
        DOMAIN,
        name,
        [values[port.name] for port in spec.inputs],
        [ir.Attr(key, _KINDS[kind], attributes[key]) for key, kind in spec.attributes.items()],
        num_outputs=len(spec.outputs),
    )
    for key in (LAYER, KIND):
        if key in nodes[0].metadata_props:
            fused.metadata_props[key] = nodes[0].metadata_props[key]
    fused.name = _name(graph, spec, nodes)
    if tagged and (DOMAIN, name, "") not in model.functions:
        body = _body(spec, name, nodes)
        model.functions[body.identifier()] = body
    old = [values[port.name] for port in spec.outputs]
    for before, after in zip(old, fused.outputs, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
    graph.insert_before(max(nodes, key=list(graph).index), fused)
    ir.convenience.replace_all_uses_with(old, fused.outputs, replace_graph_outputs=True)
    graph.remove(nodes, safe=True)
    graph.sort()


def _name(graph: ir.Graph | ir.Function, spec: OpSpec, nodes: list[ir.Node]) -> str | None:
    """Return a name among inlined layers, after the last call's place: layers.3.attn.wkv/V4HcaProjections."""
    owner = (nodes[-1].name or "").rpartition("/")[0]
    if not owner:
        return None
    taken = sum((node.name or "").startswith(f"{owner}/{spec.name}") for node in graph)
    return f"{owner}/{spec.name}" + (f".{taken + 1}" if taken else "")


def _body(spec: OpSpec, name: str, nodes: list[ir.Node]) -> ir.Function:
    """Return the fused op's body: the calls that were matched, with the bodies that they had."""
    values = {port.name: ir.Value(name=port.name) for port in spec.inputs}
    calls = []
    for part, node in zip(spec.parts, nodes, strict=True):
        attributes = []
        for key, kind in part.spec.attributes.items():
            wanted = part.attributes[key]
            refers = isinstance(wanted, str) and wanted.startswith("@") and wanted[1:] not in spec.structural
            attributes.append(
                ir.RefAttr(key, wanted[1:], _KINDS[kind])
                if refers
                else ir.Attr(key, _KINDS[kind], node.attributes[key].value)
            )
        inputs = [values[one] for one in part.inputs]
        calls.append(ir.Node(DOMAIN, node.op_type, inputs, attributes, num_outputs=len(part.outputs)))
        for one, value in zip(part.outputs, calls[-1].outputs, strict=True):
            value.name = one
            values[one] = value
    graph = ir.Graph(
        [values[port.name] for port in spec.inputs],
        [values[port.name] for port in spec.outputs],
        nodes=calls,
        opset_imports={"": OPSET, DOMAIN: 1},
    )
    declared = [ir.Attr(key, _KINDS[kind], None) for key, kind in spec.attributes.items()]
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=declared)
