"""The check of transforms, which change outputs on purpose: what they must leave alone is the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from v4graph.errors import PassError
from v4graph.passes.keep_layers import KeepLayers
from v4graph.passes.run import apply
from v4graph.verify.pass_check import copy as copied
from v4graph.verify.pass_check import model_inputs, one_of_each_kind, run
from v4graph.verify.random_inputs import Sizes, random_inputs
from v4graph.verify.twin import float32_twin


def check_layers(before: ir.Model, after: ir.Model, sizes: Sizes | None = None) -> str:
    """The layers up to the first gap take the same states to the same states; the logits are finite.

    Raises:
        PassError: names the first state that differs.
    """
    sizes = sizes or Sizes()
    kept = _numbers(after)
    prefix = [i for i, layer in enumerate(kept) if i == layer]
    first, second = copied(before), copied(after)
    apply(KeepLayers(prefix or kept[:1]), first)
    for model in (first, second):
        float32_twin(model)
    inputs = random_inputs(model_inputs(first, second), sizes)
    one, other = run(first, inputs), run(second, inputs)
    common = [name for name in one if name.startswith("next.") and name in other]
    for name in common if prefix else ():
        if not np.array_equal(one[name], other[name]):
            raise PassError(f"transform layers: state '{name}' differs from that of the whole graph.")
    if not np.isfinite(other["logits"]).all():
        raise PassError("transform layers: the logits of the shorter graph are not finite.")
    return f"{len(common)} states equal, logits finite"


def check_last_logits(before: ir.Model, after: ir.Model, sizes: Sizes | None = None) -> str:
    """The logits are those of the last valid token before.

    Raises:
        PassError: they are not.
    """
    sizes = sizes or Sizes()
    first, second = copied(before), copied(after)
    for model in (first, second):
        apply(KeepLayers(one_of_each_kind(before)), model)
        float32_twin(model)
    inputs = random_inputs(model_inputs(first, second), sizes)
    rows = run(first, inputs)["logits"]
    want = np.stack([rows[slot, max(count - 1, 0)] for slot, count in enumerate(sizes.num)])
    got = run(second, inputs)["logits"]
    if got.shape != want.shape or not np.allclose(got, want, rtol=1e-5, atol=1e-5):
        raise PassError("transform last-logits: the logits are not those of each slot's last valid token.")
    return "equal to the last valid token's"


def _numbers(model: ir.Model) -> list[int]:
    return sorted(int(name[7:]) for node in model.graph if (name := node.name or "").startswith("layers."))
