"""The pipelines, each a literal tuple in its only order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from v4graph.ops import fused
from v4graph.passes.defer_hyper_post import DeferHyperPost
from v4graph.passes.fuse_ops import FuseOps
from v4graph.passes.gather_experts import GatherExperts
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.keep_layers import KeepLayers
from v4graph.passes.last_logits import LastLogits
from v4graph.passes.remove_dead_states import RemoveDeadStates
from v4graph.passes.strip_plugin_bodies import StripPluginBodies


@dataclass(frozen=True)
class Transform:
    """A pass that changes what the model gives: one line on it, its maker, and whether it takes a number."""

    summary: str
    make: Callable[[int], ir.passes.InPlacePass]
    takes_number: bool = False


# What `v4graph export` runs, and `v4graph optimize` by default. Every pass keeps the numbers.
DEFAULT: tuple[ir.passes.PassBase, ...] = (
    # Phase 1. Nothing twice, nothing for nothing
    common.DeduplicateInitializersPass(),
    common.RemoveUnusedNodesPass(),
    RemoveDeadStates(),
    # Phase 2. Fewer launches: across layers, then the widest pattern of each kind first
    DeferHyperPost(),
    FuseOps(fused.HYPER_POST_PRE),
    FuseOps(fused.CSA_PROJECTIONS),
    FuseOps(fused.HCA_PROJECTIONS),
    # Before the window's two projections, whose pattern the latent's two have as well.
    FuseOps(fused.CSA_QUERY_PROJECTIONS),
    FuseOps(fused.WINDOW_PROJECTIONS),
    FuseOps(fused.QUERY_PROJECTION),
    FuseOps(fused.CSA_PREP),
    FuseOps(fused.HCA_PREP),
    # Phase 3. Bodies that nothing calls any more
    common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
)


# Run on request only: they keep the numbers too, but are for some backends.
OPTIONAL: tuple[ir.passes.PassBase, ...] = (
    # For plain onnxruntime.
    GatherExperts(),
    # For readers and tools that know no functions.
    InlineLayers(),
    common.InlinePass(),
)

# What changes outputs on purpose; `v4graph optimize --transform NAME[=VALUE]`.
TRANSFORMS: Mapping[str, Transform] = {
    "layers": Transform("Keep the first N layers only.", lambda count: KeepLayers(range(count)), True),
    "last-logits": Transform("Logits of each slot's last valid token, not of all.", lambda _: LastLogits()),
}


def tensorrt(plugins: Collection[str]) -> tuple[ir.passes.InPlacePass, ...]:
    """Return the lowering to TensorRT, where the ops in `plugins` are plugins."""
    return (
        # Phase 1. What has a plugin needs no body
        StripPluginBodies(plugins),
        # Phase 2. Names that a user can find in the checkpoint
        InlineLayers(),
    )
