"""V4HyperPost: write a sublayer's output back into the mixed residual streams.

Source: spec section 2.1, step 5: X'_k = post_k y + sum_j C_jk X_j.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from v4graph.ops.spec import F32, FLOAT, OpSpec, Port

if TYPE_CHECKING:
    from torch import Tensor


def hyper_post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Return the next streams [B, S, 4, D]."""
    mixed = comb.transpose(-1, -2) @ x.float()
    return (post[..., None] * y.float()[:, :, None] + mixed).to(x.dtype)


OP = OpSpec(
    name="V4HyperPost",
    version=1,
    inputs=(
        Port("y", FLOAT, "B S D"),
        Port("x", FLOAT, "B S 4 D"),
        Port("post", F32, "B S 4"),
        Port("comb", F32, "B S 4 4"),
    ),
    outputs=(Port("z", FLOAT, "B S 4 D"),),
    attributes={},
    reference=hyper_post,
    tolerance={"float32": (1e-4, 1e-5), "bfloat16": (1.6e-2, 1e-3)},
)
