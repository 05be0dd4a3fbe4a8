"""DeferHyperPost: every layer hands four values on, and the head ends what the last one began."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir

from v4graph.passes.defer_hyper_post import DeferHyperPost
from v4graph.passes.inline_layers import InlineLayers


def function(model: ir.Model, name: str) -> ir.Function:
    return next(f for f in model.functions.values() if f.name == name)


def test_layers_take_and_give_what_a_hyper_post_reads(nano_model: Callable[[], ir.Model]) -> None:
    model = nano_model()
    before = function(model, "V4Layer_hca_topk")
    states = [value.name for value in before.outputs[1:]]
    assert DeferHyperPost()(model).modified
    layer = function(model, "V4Layer_hca_topk")
    assert [value.name for value in layer.inputs[:4]] == [
        f"before.{name}" for name in ("y", "x", "post", "comb")
    ]
    assert [value.name for value in layer.outputs[4:]] == states
    assert next(iter(layer)).op_type == "V4HyperPost"
    assert [node.op_type for node in layer].count("V4HyperPost") == 2
    assert next(iter(function(model, "V4Head"))).op_type == "V4HyperPost"
    assert len(function(model, "V4Embed").outputs) == 4
    calls = [node for node in model.graph if node.name == "layers.1"]
    assert [value.name for value in calls[0].inputs[:4]] == [
        f"layers.0.pending.{name}" for name in ("output", "streams", "post", "comb")
    ]
    onnx.checker.check_model(ir.to_proto(model))
    assert not DeferHyperPost()(model).modified


def test_inlined_layers_and_graphs_without_a_head_are_left_alone(nano_model: Callable[[], ir.Model]) -> None:
    model = nano_model()
    InlineLayers()(model)
    assert not DeferHyperPost()(model).modified


def test_a_layer_that_ends_otherwise_stops_it(nano_model: Callable[[], ir.Model]) -> None:
    model = nano_model()
    layer = function(model, "V4Layer_csa_topk")
    negated = ir.node("Neg", [layer.outputs[0]])
    layer.append(negated)
    layer.outputs[0] = negated.outputs[0]
    assert not DeferHyperPost()(model).modified
