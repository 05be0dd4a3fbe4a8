"""In onnxruntime, compute the experts of an only token from a gather of their matrices, not in a Loop.

Before: the body of V4MoEFloat loops over the experts that are hit. After: with one token it gathers the K
matrices and multiplies them at once; with more it calls the body as it was, now `V4MoEFloat__loop`. For
unquantised experts only: of FP4 and FP8 ones a gather would decode as much as the loop does.
"""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from v4graph.ops import DOMAIN

_BODY = """
<domain: "v4graph", opset_import: ["" : 24, "v4graph" : 1]>
V4MoEFloat <limit> (u, ids, weights, w1, w3, w2, s1, s3, s2) => (y)
{
  all = Constant <value = int64[1] {-1}> ()
  pairs = Size (ids)
  fan_out = Shape <start = 2, end = 3> (ids)
  choices = Squeeze (fan_out)
  alone = Equal (pairs, choices)
  y = If (alone) <
    then_branch = one () => (one_y) {
      column = Constant <value = int64[2] {-1, 1}> ()
      row = Constant <value = int64[2] {1, -1}> ()
      first = Constant <value = int64[1] {0}> ()
      per_expert = Constant <value = int64[3] {-1, 1, 1}> ()
      one = Constant <value = float[1] {1}> ()
      top = Constant <value_float: float = @limit> ()
      bottom = Neg (top)
      chosen = Reshape (ids, all)
      x = Reshape (u, column)
      gain = Reshape (weights, per_expert)
      w1_k = Gather <axis = 0> (w1, chosen)
      w3_k = Gather <axis = 0> (w3, chosen)
      w2_k = Gather <axis = 0> (w2, chosen)
      gate = MatMul (w1_k, x)
      value = MatMul (w3_k, x)
      gate_low = Min (gate, top)
      value_low = Min (value, top)
      value_in = Max (value_low, bottom)
      open = Sigmoid (gate_low)
      silu = Mul (gate_low, open)
      product = Mul (silu, value_in)
      inner = Mul (product, gain)
      routed_k = MatMul (w2_k, inner)
      routed = ReduceSum <keepdims = 0> (routed_k, first)
      routed_row = Reshape (routed, row)
      x_row = Reshape (u, row)
      shared = v4graph.V4ExpertFloat <limit: float = @limit> (x_row, one, s1, s3, s2)
      total = Add (shared, routed_row)
      shape = Shape (u)
      one_y = Reshape (total, shape)
    },
    else_branch = many () => (many_y) {
      many_y = v4graph.V4MoEFloat__loop <limit: float = @limit> (u, ids, weights, w1, w3, w2, s1, s3, s2)
    }
  >
}
"""
_OLD, _NEW = (DOMAIN, "V4MoEFloat", ""), (DOMAIN, "V4MoEFloat__loop", "")


class GatherExperts(ir.passes.InPlacePass):
    """Gathers the float experts of an only token in onnxruntime, where the body loops over them."""

    def __repr__(self) -> str:
        return "GatherExperts"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change `model` in place."""
        body = model.functions.get(_OLD)
        if body is None or _NEW in model.functions:
            return ir.passes.PassResult(model, modified=False)
        del model.functions[_OLD]
        body.name = _NEW[1]
        model.functions[_NEW] = body
        gathered = ir.from_proto(onnx.parser.parse_function(_BODY))
        assert isinstance(gathered, ir.Function)
        model.functions[_OLD] = gathered
        return ir.passes.PassResult(model, modified=True)
