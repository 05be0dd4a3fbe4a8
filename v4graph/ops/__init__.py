"""All custom ops, listed explicitly; importing this package registers nothing and loads no torch."""

from v4graph.ops import (
    attention,
    attention_prep,
    compress,
    expert,
    fp8_linear,
    fused,
    grouped_output,
    hyper_head,
    hyper_post,
    hyper_pre,
    index_topk,
    linear,
    moe,
    rms_norm,
    route,
)
from v4graph.ops.spec import DOMAIN, OPSET, OpSpec, Port

ALL_OPS: tuple[OpSpec, ...] = (
    hyper_pre.OP,
    hyper_post.OP,
    hyper_head.OP,
    rms_norm.OP,
    linear.OP,
    linear.F32_OP,
    fp8_linear.OP,
    attention_prep.OP,
    compress.OP,
    index_topk.OP,
    attention.WINDOW_OP,
    attention.COMPRESSED_OP,
    attention.SELECTED_OP,
    grouped_output.OP,
    grouped_output.FP8_OP,
    route.TOPK_OP,
    route.HASH_OP,
    moe.OP,
    moe.FP8_OP,
    moe.FLOAT_OP,
    # Called by the bodies of the MoE ops only.
    expert.FP4_OP,
    expert.FP8_OP,
    expert.FLOAT_OP,
    # Made by passes.
    *fused.FUSED_OPS,
)

OPS_BY_NAME = {op.name: op for op in ALL_OPS}

__all__ = ["ALL_OPS", "DOMAIN", "OPSET", "OPS_BY_NAME", "OpSpec", "Port"]
