"""Per-node facts that passes leave in `node.metadata_props`, and what is read from them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from v4graph.ops import DOMAIN, OPS_BY_NAME, OpSpec

LAYER = "v4graph.layer"  # "layers.3", "embed" or "head"
KIND = "v4graph.layer_kind"  # "csa_topk"; the layer itself for the embedding and the head
LAYER_PREFIX = "V4Layer_"  # of the layer functions
# Every call of a model takes these, whether or not a graph looks at them.
RUNTIME_INPUTS = ("input_ids", "start_pos", "num_tokens")


def plain_name(op_type: str) -> str:
    """Return the op of a tagged name: V4Compress__overlap_1_quantise_kv -> V4Compress."""
    return op_type.partition("__")[0]


def custom_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, OpSpec]]:
    """Yield the custom ops of the top-level graph in order."""
    for node in model.graph:
        spec = OPS_BY_NAME.get(plain_name(node.op_type)) if node.domain == DOMAIN else None
        if spec is not None:
            yield node, spec


def drop_unread_inputs(model: ir.Model) -> bool:
    """Remove the graph inputs that nothing reads, but for the runtime's; return whether there were any."""
    unread = [
        value
        for value in model.graph.inputs
        if not value.uses() and not value.is_graph_output() and value.name not in RUNTIME_INPUTS
    ]
    for value in unread:
        model.graph.inputs.remove(value)
    return bool(unread)


def where(node: ir.Node) -> str:
    """Return a node's place for an error text: "layers.3.attn.wq_a/V4Fp8Linear (csa_topk layer)"."""
    kind = node.metadata_props.get(KIND, "")
    return f"{node.name} ({kind} layer)" if kind.count("_") else f"{node.name}"
