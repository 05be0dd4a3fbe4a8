"""The pipelines, each a literal tuple in its only order."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.strip_plugin_bodies import StripPluginBodies


def tensorrt(plugins: Collection[str]) -> tuple[ir.passes.InPlacePass, ...]:
    """Return the lowering to TensorRT, where the ops in `plugins` are plugins."""
    return (
        # Phase 1. What has a plugin needs no body
        StripPluginBodies(plugins),
        # Phase 2. Names that a user can find in the checkpoint
        InlineLayers(),
    )
