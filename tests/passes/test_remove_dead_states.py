"""RemoveDeadStates: a state that reaches no logits goes, with its weights; one that does stays."""

from __future__ import annotations

import re

import onnx_ir as ir

from v4graph.passes.remove_dead_states import RemoveDeadStates

TEXT = """<ir_version: 10, opset_import: ["" : 24, "v4graph" : 1]>
g (int64[B,S] input_ids, int32[B] start_pos, float[B,8] x, float[B,8] state_0_window, float[B,8]
state_0_index_keys,
   float[8] layers_0_used, float[8] layers_0_index_only)
  => (float[B,8] logits, float[B,8] next_0_window, float[B,8] next_0_index_keys) {
  logits, next_0_window, next_0_index_keys =
      v4graph.V4Layer_a (x, input_ids, state_0_window, state_0_index_keys, layers_0_used, layers_0_index_only)
}
<domain: "v4graph", opset_import: ["" : 24]>
V4Layer_a (x, tokens, window, keys, used, index_only) => (y, next_window, next_keys) {
  next_window = Add (window, x)
  next_keys = Mul (keys, index_only)
  scaled = Mul (x, used)
  y = Add (scaled, window)
}
"""


def dotted(text: str) -> ir.Model:
    """The model, with names as graphs have them: the parser takes no dots."""
    model = ir.from_onnx_text(text)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = re.sub(r"_0_", ".0.", str(value.name))
    return model


def names(values: list[ir.Value]) -> list[str]:
    return [str(value.name) for value in values]


def test_a_state_that_only_feeds_itself_goes_with_what_only_it_reads() -> None:
    model = dotted(TEXT)
    assert RemoveDeadStates()(model).modified
    assert names(list(model.graph.inputs)) == [
        "input_ids",
        "start_pos",
        "x",
        "state.0.window",
        "layers.0.used",
    ]
    assert names(list(model.graph.outputs)) == ["logits", "next.0.window"]
    (layer,) = model.functions.values()
    assert names(list(layer.inputs)) == ["x", "window", "used"]
    assert [node.op_type for node in layer] == ["Add", "Mul", "Add"]
    assert not RemoveDeadStates()(model).modified


def test_a_state_that_reaches_the_logits_a_step_later_stays() -> None:
    live = TEXT.replace(
        "next_window = Add (window, x)", "sum = Add (window, x)\n  next_window = Add (sum, keys)"
    )
    model = dotted(live)
    RemoveDeadStates()(model)
    assert "state.0.index_keys" in names(list(model.graph.inputs))
    assert "layers.0.index_only" in names(list(model.graph.inputs))
