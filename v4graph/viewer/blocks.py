"""Measured parts of a model at several contexts, as JSON: each distinct part once, and where it is.

A figure that is the same at every context is written once, else as a list in the order of the contexts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from v4graph.passes.measure import Block, NodeFacts, Tensor
from v4graph.viewer.names import Names, part, plain

Json = dict[str, Any]
_Value = TypeVar("_Value")


def varying(values: Sequence[_Value]) -> _Value | list[_Value]:
    """Return one value if all are equal, else the list of them."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def layout(runs: Sequence[Sequence[Block]], names: Names) -> Json:
    """Return `blocks` (distinct parts), `layers` (every part in order) and `groups` (parts that are alike).

    `runs` holds the same model at one context each.
    """
    blocks: list[Json] = []
    seen: dict[str, int] = {}
    by_nodes: dict[tuple[int, ...], int] = {}
    layers: list[Json] = []
    for parts in zip(*runs, strict=True):
        # Layers that call one function share their nodes, so most need no look at what they hold.
        identity = (*(id(node) for block in parts for node in block.nodes), _is_layer(parts[0].name))
        if identity not in by_nodes:
            block = {"nodes": _nodes(parts, names)}
            key = json.dumps(block, sort_keys=True)
            if key not in seen:
                seen[key] = len(blocks)
                blocks.append(block)
            by_nodes[identity] = seen[key]
        layers.append({"name": parts[0].name, "kind": parts[0].kind, "block": by_nodes[identity]})
    return {"blocks": blocks, "layers": layers, "groups": groups(layers, ("kind", "block"))}


def _is_layer(name: str) -> bool:
    return name.startswith("layers.")


def groups(layers: Sequence[Json], keys: Sequence[str]) -> list[Json]:
    """Join layers that agree in `keys`, in order of the first of each."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for layer in layers:
        found.setdefault(tuple(layer[key] for key in keys), []).append(layer["name"])
    return [
        {**dict(zip(keys, values, strict=True)), "label": label(names), "count": len(names), "layers": names}
        for values, names in found.items()
    ]


def label(names: Sequence[str]) -> str:
    """Return a short name of some parts: "layers 3, 5, 7 … 41"."""
    numbers = [name.removeprefix("layers.") for name in names]
    if not all(number.isdigit() for number in numbers):
        return ", ".join(names)
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    if len(numbers) > 3 and int(numbers[-1]) - int(numbers[0]) == len(numbers) - 1:
        return f"layers {numbers[0]} to {numbers[-1]}"
    shown = numbers if len(numbers) <= 4 else [*numbers[:3], "…", numbers[-1]]
    return f"layers {', '.join(shown)}".replace(", …, ", " … ")


def totals(runs: Sequence[Sequence[Block]]) -> list[Json]:
    """Return the figures of one step at each context; `unknown` counts ops whose launches are not known."""
    rows = []
    for blocks in runs:
        nodes = [node for block in blocks for node in block.nodes]
        rows.append(
            {
                "nodes": len(nodes),
                "custom": sum(node.custom for node in nodes),
                "bytes": sum(node.bytes for node in nodes),
                "flops": sum(node.flops for node in nodes),
                "launches": sum(node.launches or 0 for node in nodes),
                "unknown": sum(node.launches is None for node in nodes),
            }
        )
    return rows


def _nodes(parts: Sequence[Block], names: Names) -> list[Json]:
    shown = _Activations()
    return [
        _node(nodes, parts[0].name, names, shown)
        for nodes in zip(*(block.nodes for block in parts), strict=True)
    ]


def _node(nodes: Sequence[NodeFacts], block: str, names: Names, shown: _Activations) -> Json:
    """Return one node; `nodes` is that node at each context."""
    node = nodes[0]
    role = names.role(node.inputs)
    inputs = [_tensor(tensors, names, shown.read) for tensors in zip(*(n.inputs for n in nodes), strict=True)]
    outputs = [
        _tensor(tensors, names, shown.write) for tensors in zip(*(n.outputs for n in nodes), strict=True)
    ]
    return {
        "op": node.op,
        "custom": node.custom,
        "role": role,
        "part": part(node, role, block),
        "inputs": inputs,
        "outputs": outputs,
        "attributes": {key: _attribute(value) for key, value in sorted(node.attributes.items())},
        "bytes": varying([n.bytes for n in nodes]),
        "flops": varying([n.flops for n in nodes]),
        "launches": varying([n.launches for n in nodes]),
    }


def _tensor(tensors: Sequence[Tensor], names: Names, shown: Any) -> Json:
    name = plain(tensors[0].name)
    kind = names.kind(name)
    return {
        "name": shown(tensors[0].name) if kind == "activation" else name,
        "kind": kind,
        "dtype": tensors[0].dtype,
        "shape": varying(["\u00d7".join(str(dim) for dim in tensor.shape) or "scalar" for tensor in tensors]),
    }


def _attribute(value: Any) -> int | float | str:
    """Return an attribute as JSON has it; ONNX holds 1e-6 in 32 bits."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    return value if isinstance(value, int | str) else str(value)


class _Activations:
    """Names the activations of one part, so that equal parts have equal names."""

    def __init__(self) -> None:
        self._own: set[str] = set()
        self._above: dict[str, str] = {}

    def write(self, name: str) -> str:
        """Return the name of a tensor that this part computes."""
        self._own.add(name)
        return plain(name)

    def read(self, name: str) -> str:
        """Return a tensor's name; of another layer, in a graph without functions, `above.1` and so on."""
        if name in self._own or not name.startswith(("layers.", "embed.")):
            return plain(name)
        return self._above.setdefault(name, f"above.{len(self._above) + 1}")
