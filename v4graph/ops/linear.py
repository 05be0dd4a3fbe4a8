"""V4Linear and V4LinearF32: unquantised projections, in the graph's dtype or with float32 results.

As ops of their own, because a backend's MatMul first needs the bf16 weight as a float32 copy (of the
whole head, at every token) where the official code multiplies in float32, and because native layers
between plugins cost plan size. Source: spec sections 2.3 (compressor), 2.4 (indexer), 4 (head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.lazy import torch
from v4graph.ops.spec import F32, FLOAT, WEIGHT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor

_INPUTS = (Port("x", FLOAT, "B S K"), Port("weight", WEIGHT, "O K"))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T [B, S, O] in the dtype of x."""
    return torch.nn.functional.linear(x, weight.to(x.dtype))


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T [B, S, O], multiplied and summed in float32."""
    return torch.nn.functional.linear(x.float(), weight.float())


OP = OpSpec(
    name="V4Linear",
    version=1,
    inputs=_INPUTS,
    outputs=(Port("y", FLOAT, "B S O"),),
    attributes={},
    reference=linear,
    tolerance={"float32": (1e-4, 1e-4), "bfloat16": (1.6e-2, 1e-2)},
)

F32_OP = OpSpec(
    name="V4LinearF32",
    version=1,
    inputs=_INPUTS,
    outputs=(Port("y", F32, "B S O"),),
    attributes={},
    reference=linear_f32,
    tolerance={"float32": (1e-4, 1e-4), "bfloat16": (1e-4, 1e-4)},
)
