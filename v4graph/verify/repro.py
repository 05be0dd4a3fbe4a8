"""A reproducer: one op that gives wrong numbers, with as little of its inputs as still shows it, in one file.

An npz archive: `meta` (JSON: op, attributes, place, problem), `model` (ONNX of the one call with the bodies
it needs), `given.*` (the reference's inputs) and `read.*` (what the graph's op read instead, where that
differs). Inputs are cut to one slot, to one token where every token stands for itself, and to the experts
that are hit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from v4graph.errors import EngineError, V4GraphError
from v4graph.numerics import BF16
from v4graph.ops import DOMAIN, OPS_BY_NAME, OPSET, OpSpec
from v4graph.ops.tolerance import mismatch
from v4graph.verify.bisect import Culprit, reference
from v4graph.verify.pass_check import run
from v4graph.verify.random_inputs import Array

Inputs = dict[str, Array]
# In these every token is computed from itself alone.
_POSITIONAL = ("start", "ring", "cache", "tail_kv", "c_cache", "keys")


@dataclass(frozen=True)
class Repro:
    """One call: the reference's inputs and the graph's, and the model that computes it."""

    spec: OpSpec
    attributes: dict[str, Any]
    place: str
    given: Inputs
    read: Inputs
    model: bytes

    def problem(self) -> str:
        """Run both; return what is wrong, or an empty string.

        Raises:
            EngineError: onnxruntime refuses the model.
        """
        want = reference(self.spec, self.given, self.attributes)
        got = run(ir.from_proto(onnx.load_from_string(self.model)), {**self.given, **self.read})
        for port in self.spec.outputs:
            found = mismatch(self.spec, got[f"out.{port.name}"], want[port.name], self.attributes)
            if found:
                return f"output '{port.name}': {found.removeprefix(f'{self.spec.name}: ')}"
        return ""

    def save(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it."""
        arrays: dict[str, Any] = {f"given.{name}": array for name, array in self.given.items()}
        arrays |= {f"read.{name}": array for name, array in self.read.items()}
        # numpy's files know no bf16.
        narrow = [name for name, array in arrays.items() if array.dtype.name == "bfloat16"]
        arrays |= {name: arrays[name].view(np.uint16) for name in narrow}
        meta = {
            "op": self.spec.name,
            "version": self.spec.version,
            "place": self.place,
            "attributes": self.attributes,
            "bfloat16": narrow,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(
                file, meta=np.array(json.dumps(meta)), model=np.frombuffer(self.model, np.uint8), **arrays
            )
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Repro:
        """Read a file that `save` wrote.

        Raises:
            V4GraphError: it is something else, or of another version of the op.
        """
        try:
            with np.load(path) as archive:
                meta = json.loads(str(archive["meta"]))
                arrays = {name: archive[name] for name in archive.files}
            arrays |= {name: arrays[name].view(BF16) for name in meta.get("bfloat16", ())}
            spec = OPS_BY_NAME[meta["op"]]
        except (OSError, ValueError, KeyError) as error:
            raise V4GraphError(
                f"{path}: not a reproducer of this v4graph ({error}); `v4graph verify A B` writes them."
            ) from error
        if meta["version"] != spec.version:
            raise V4GraphError(
                f"{path}: is of {spec.name} version {meta['version']}, this v4graph has version "
                f"{spec.version}; "
                "verify again to get a new one."
            )
        parts = {kind: _named(arrays, f"{kind}.") for kind in ("given", "read")}
        return cls(spec, meta["attributes"], meta["place"], **parts, model=arrays["model"].tobytes())


def _named(arrays: Inputs, prefix: str) -> Inputs:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def reproduce(culprit: Culprit) -> Repro:
    """Return the smallest cut of a wrong call that is still wrong; of a fused op its first wrong part."""
    node = next(node for node in culprit.model.graph if node.name == culprit.node)
    model = _one_call(culprit.model, node, culprit.spec, {**culprit.inputs, **culprit.read})
    whole = Repro(culprit.spec, culprit.attributes, culprit.node, culprit.inputs, culprit.read, model)
    smallest = next((part for part in _parts(whole, culprit, node) if _still_wrong(part)), whole)
    for cut in (_slots, _tokens, _experts):
        smallest = next((one for one in cut(smallest) if _still_wrong(one)), smallest)
    return smallest


def _still_wrong(candidate: Repro) -> bool:
    try:
        return bool(candidate.problem())
    except (EngineError, ValueError, IndexError, RuntimeError):
        return False  # the cut left shapes that the op does not take


def _parts(whole: Repro, culprit: Culprit, node: ir.Node) -> Iterator[Repro]:
    """The calls inside a fused op, each on what the references of those before it give."""
    body = culprit.model.functions.get(node.op_identifier())
    if not whole.spec.parts or body is None:
        return
    values = dict(whole.given)
    for part, call in zip(whole.spec.parts, body, strict=True):
        given = {port.name: values[name] for port, name in zip(part.spec.inputs, part.inputs, strict=True)}
        read = {
            port.name: whole.read[name]
            for port, name in zip(part.spec.inputs, part.inputs, strict=True)
            if name in whole.read
        }
        attributes = part.attribute_values(whole.attributes)
        alone = ir.Node(
            DOMAIN,
            call.op_type,
            call.inputs,
            [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()],
        )
        model = _one_call(culprit.model, alone, part.spec, {**given, **read})
        place = f"{whole.place}, its {part.spec.name}"
        yield Repro(part.spec, attributes, place, given, read, model)
        results = reference(part.spec, given, attributes)
        values |= {
            name: results[port.name] for port, name in zip(part.spec.outputs, part.outputs, strict=True)
        }


def _one_call(source: ir.Model, node: ir.Node, spec: OpSpec, read: Inputs) -> bytes:
    """Return an ONNX model of the one node, with the functions that it calls."""
    inputs = [_typed(port.name, read[port.name].dtype.name) for port in spec.inputs]
    alone = ir.Node(DOMAIN, node.op_type, inputs, node.attributes.values(), num_outputs=len(spec.outputs))
    for port, value in zip(spec.outputs, alone.outputs, strict=True):
        value.name = f"out.{port.name}"
        dtype = "float32" if port.is_float else port.dtypes[0]
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        value.shape = ir.Shape([None] * len(port.dims))
    for port, value in zip(spec.inputs, inputs, strict=True):
        value.shape = ir.Shape([None] * len(port.dims))
    opsets = {"": OPSET, DOMAIN: 1}
    graph = ir.Graph(inputs, alone.outputs, nodes=[alone], opset_imports=opsets, name="one_call")
    whole = ir.from_proto(ir.to_proto(source))
    model = ir.Model(graph, ir_version=10, functions=list(whole.functions.values()))
    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def _typed(name: str, dtype: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))))


def _cut(repro: Repro, keep: dict[str, Any]) -> Repro:
    """Keep of every dimension with a symbol in `keep` the chosen indices."""
    dims = {port.name: port.dims for port in repro.spec.inputs}

    def cut(name: str, array: Array) -> Array:
        for axis, dim in enumerate(dims[name]):
            if dim in keep:
                array = np.take(array, keep[dim], axis)
        return array

    return Repro(
        repro.spec,
        repro.attributes,
        repro.place,
        {name: cut(name, array) for name, array in repro.given.items()},
        {name: cut(name, array) for name, array in repro.read.items()},
        repro.model,
    )


def _size(repro: Repro, symbol: str) -> int:
    for port in repro.spec.inputs:
        if symbol in port.dims:
            return int(repro.given[port.name].shape[port.dims.index(symbol)])
    return 0


def _slots(repro: Repro) -> Iterator[Repro]:
    """One slot at a time."""
    yield from (_cut(repro, {"B": [slot]}) for slot in range(_size(repro, "B")))


def _tokens(repro: Repro) -> Iterator[Repro]:
    """One token, where an op knows no positions."""
    if not any(port.name in _POSITIONAL for port in repro.spec.inputs):
        yield from (_cut(repro, {"S": [token]}) for token in range(_size(repro, "S")))


def _experts(repro: Repro) -> Iterator[Repro]:
    """The experts that are hit, renumbered."""
    if "ids" not in repro.given or not _size(repro, "E"):
        return
    hit = np.unique(repro.given["ids"])
    cut = _cut(repro, {"E": hit})
    given = {**cut.given, "ids": np.searchsorted(hit, cut.given["ids"]).astype(np.int32)}
    yield Repro(cut.spec, cut.attributes, cut.place, given, cut.read, cut.model)
