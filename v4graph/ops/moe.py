"""V4MoE, V4MoEFp8, V4MoEFloat: routed experts plus the shared expert.

The three differ in how the routed experts are stored: FP4 (the releases), FP8 (Base checkpoints),
float (exact numerics). Accumulation is float32, in the order of the expert index after the shared
expert. The body is written by hand: a Loop over the experts that were hit, because an export of
this reference would have to compute every expert. Source: spec section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from v4graph.ops import expert
from v4graph.ops.lazy import torch
from v4graph.ops.spec import F32, FLOAT, I8, I32, SCALE, WEIGHT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


Expert = Callable[..., "Tensor"]


def _mixture(routed: Expert, shared: Expert, count: int) -> Callable[..., Tensor]:
    """Return the reference of one MoE form.

    Its arguments are those of the op's ports: u [B, S, D], ids and weights [B, S, K], `count`
    matrices of the routed experts [E, ...], as many of the shared expert, and the clamp limit.
    """

    def reference(u: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> Tensor:
        matrices, shared_matrices, limit = rest[:count], rest[count:-1], rest[-1]
        x = u.reshape(-1, u.shape[-1])
        chosen, gains = ids.reshape(x.shape[0], -1).long(), weights.reshape(x.shape[0], -1)
        total = shared(x, torch.ones(x.shape[0]), *shared_matrices, limit)
        for e in torch.unique(chosen).tolist():
            hit = chosen == e
            rows = hit.any(1).nonzero()[:, 0]
            gain = torch.where(hit, gains, 0.0).sum(1)[rows]
            y = routed(x[rows], gain, *(matrix[e] for matrix in matrices), limit)
            total = total.index_add(0, rows, y)
        return total.to(u.dtype).reshape(u.shape)

    return reference


_BODY = """
<domain: "v4graph", opset_import: ["" : 24, "v4graph" : 1]>
{name} <limit> ({inputs}) => (y)
{{
  shape = Shape (u)
  width = Shape <start = 2, end = 3> (u)
  fan_out = Shape <start = 2, end = 3> (ids)
  all = Constant <value = int64[1] {{-1}}> ()
  as_rows = Concat <axis = 0> (all, width)
  as_choices = Concat <axis = 0> (all, fan_out)
  x = Reshape (u, as_rows)
  ids64 = Cast <to = 7> (ids)
  chosen = Reshape (ids64, as_choices)
  gains = Reshape (weights, as_choices)
  tokens = Shape <start = 0, end = 1> (x)
  one = Constant <value = float[1] {{1}}> ()
  zero = Constant <value = float[1] {{0}}> ()
  last = Constant <value = int64[1] {{1}}> ()
  ones = Expand (one, tokens)
  begin = v4graph.{shared_op} <limit: float = @limit> (x, ones, {shared})
  hit = Unique <sorted = 1> (chosen)
  hits = Size (hit)
  true = Constant <value = bool {{1}}> ()
  total = Loop <body = step (int64 i, bool going, float[n, d] sum) => (bool still, float[n, d] next)
  {{
    still = Identity (going)
    e = Gather (hit, i)
    mine = Equal (chosen, e)
    gain_of = Where (mine, gains, zero)
    gain_all = ReduceSum <keepdims = 0> (gain_of, last)
    mine_float = Cast <to = 1> (mine)
    times = ReduceSum <keepdims = 0> (mine_float, last)
    found = NonZero (times)
    rows = Transpose <perm = [1, 0]> (found)
    xe = GatherND (x, rows)
    gain = GatherND (gain_all, rows)
    {gathers}
    ye = v4graph.{routed_op} <limit: float = @limit> (xe, gain, {picked})
    next = ScatterND <reduction = "add"> (sum, rows, ye)
  }}> (hits, true, begin)
  typed = Cast <to = {onnx_dtype}> (total)
  y = Reshape (typed, shape)
}}
"""

_ONNX_DTYPE = {"float32": 1, "bfloat16": 16}


def _body(name: str, routed: tuple[str, str], shared: tuple[str, str]) -> Callable[[Mapping[str, Any]], str]:
    """Return a builder of the ONNX text of one MoE form; pairs are (expert op, its matrix names)."""

    def build(variant: Mapping[str, Any]) -> str:
        matrices, shared_matrices = routed[1].split(), shared[1].split()
        return _BODY.format(
            name=name,
            inputs=", ".join(["u", "ids", "weights", *matrices, *shared_matrices]),
            routed_op=routed[0],
            shared_op=shared[0],
            shared=", ".join(shared_matrices),
            gathers="\n    ".join(f"{m}_e = Gather <axis = 0> ({m}, e)" for m in matrices),
            picked=", ".join(f"{m}_e" for m in matrices),
            onnx_dtype=_ONNX_DTYPE[variant["dtype"]],
        )

    return build


_ROUTING = (Port("u", FLOAT, "B S D"), Port("ids", I32, "B S K"), Port("weights", F32, "B S K"))
_SHARED_FP8 = (
    Port("s1", I8, "Is D"),
    Port("s1_scale", SCALE, "IsB DB"),
    Port("s3", I8, "Is D"),
    Port("s3_scale", SCALE, "IsB DB"),
    Port("s2", I8, "D Is"),
    Port("s2_scale", SCALE, "DB IsB"),
)
_OUT = (Port("y", FLOAT, "B S D"),)
_TOLERANCE = {"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)}
_QUANTISED = "w1 w1_scale w3 w3_scale w2 w2_scale"
_SHARED = "s1 s1_scale s3 s3_scale s2 s2_scale"

OP = OpSpec(
    name="V4MoE",
    version=1,
    inputs=(
        *_ROUTING,
        Port("w1", I8, "E I D2"),
        Port("w1_scale", I8, "E I DS"),
        Port("w3", I8, "E I D2"),
        Port("w3_scale", I8, "E I DS"),
        Port("w2", I8, "E D I2"),
        Port("w2_scale", I8, "E D IS"),
        *_SHARED_FP8,
    ),
    outputs=_OUT,
    attributes={"limit": float},
    reference=_mixture(expert.expert_fp4, expert.expert_fp8, 6),
    tolerance=_TOLERANCE,
    flips=2e-2,
    body=_body("V4MoE", ("V4ExpertFp4", _QUANTISED), ("V4ExpertFp8", _SHARED)),
)

FP8_OP = OpSpec(
    name="V4MoEFp8",
    version=1,
    inputs=(
        *_ROUTING,
        Port("w1", I8, "E I D"),
        Port("w1_scale", SCALE, "E IB DB"),
        Port("w3", I8, "E I D"),
        Port("w3_scale", SCALE, "E IB DB"),
        Port("w2", I8, "E D I"),
        Port("w2_scale", SCALE, "E DB IB"),
        *_SHARED_FP8,
    ),
    outputs=_OUT,
    attributes={"limit": float},
    reference=_mixture(expert.expert_fp8, expert.expert_fp8, 6),
    tolerance=_TOLERANCE,
    flips=2e-2,
    body=_body("V4MoEFp8", ("V4ExpertFp8", _QUANTISED), ("V4ExpertFp8", _SHARED)),
)

FLOAT_OP = OpSpec(
    name="V4MoEFloat",
    version=1,
    inputs=(
        *_ROUTING,
        Port("w1", WEIGHT, "E I D"),
        Port("w3", WEIGHT, "E I D"),
        Port("w2", WEIGHT, "E D I"),
        Port("s1", WEIGHT, "Is D"),
        Port("s3", WEIGHT, "Is D"),
        Port("s2", WEIGHT, "D Is"),
    ),
    outputs=_OUT,
    attributes={"limit": float},
    reference=_mixture(expert.expert_float, expert.expert_float, 3),
    tolerance=_TOLERANCE,
    body=_body("V4MoEFloat", ("V4ExpertFloat", "w1 w3 w2"), ("V4ExpertFloat", "s1 s3 s2")),
)
