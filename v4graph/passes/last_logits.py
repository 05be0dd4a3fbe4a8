"""Logits of each slot's last valid token only, where the graph gives those of every token.

Before: logits [B, S, V]. After: logits [B, V] of token num_tokens - 1 (the first of an idle slot); the head
works on one token per slot. A transform: the output has another shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from v4graph.errors import PassError

HEAD = "V4Head"


class LastLogits(ir.passes.InPlacePass):
    """Gives the logits of the last valid token of each slot instead of all."""

    def __repr__(self) -> str:
        return "LastLogits"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change `model` in place.

        Raises:
            PassError: the head is not a function of its own, as the exporter leaves it.
        """
        call = next((node for node in model.graph if node.op_type == HEAD), None)
        function = None if call is None else model.functions.get(call.op_identifier())
        if call is None or function is None:
            raise PassError("LastLogits: the graph has no call of V4Head; give it a graph as exported.")
        logits = call.outputs[0]
        if logits.shape is None or len(logits.shape) != 3:
            return ir.passes.PassResult(model, modified=False)
        names = [value.name for value in function.inputs]
        streams = function.inputs[: names.index("num_tokens")]
        _narrow(function, list(streams), function.inputs[names.index("num_tokens")])
        logits.shape = ir.Shape([logits.shape[0], logits.shape[2]])
        return ir.passes.PassResult(model, modified=True)


def _narrow(function: ir.Function, streams: list[ir.Value], num: ir.Value) -> None:
    """Read one token of every stream, and drop its axis from the logits."""
    before = function[0]

    def add(op: str, inputs: list[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        node = ir.node(op, inputs, dict(attributes or {}))
        function.insert_before(before, node)
        return node.outputs[0]

    def constant(value: np.ndarray) -> ir.Value:
        return add("Constant", [], {"value": ir.tensor(value)})

    axis = constant(np.array([1], np.int64))
    wide = add("Cast", [num], {"to": int(ir.DataType.INT64)})
    last = add("Max", [add("Sub", [wide, axis]), constant(np.array([0], np.int64))])
    index = add("Unsqueeze", [last, axis])
    for value in streams:
        readers = list(value.uses())
        picked = add("GatherND", [value, index], {"batch_dims": 1})
        one = add("Unsqueeze", [picked, axis])
        for node, i in readers:
            node.replace_input_with(i, one)
    logits = function.outputs[0]
    flat = ir.node("Squeeze", [logits, axis])
    flat.outputs[0].name = "last_logits"
    function.append(flat)
    function.outputs[0] = flat.outputs[0]
