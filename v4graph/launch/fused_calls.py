"""The op calls of a model after the default passes: what a built engine runs in each layer.

A layer begins with the end of the one before it, as the passes leave it. Tests compare with optimised graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4graph.config import Layer, ModelConfig
from v4graph.launch.calls import Call, Chunk, head_calls, layer_calls

_KEPT = (
    "V4WindowAttention",
    "V4CompressedAttention",
    "V4SelectedAttention",
    "V4Fp8GroupedOutput",
    "V4RouteTopK",
    "V4RouteHash",
    "V4MoE",
    "V4MoEFp8",
    "V4IndexTopK",
)


def fused_layer_calls(config: ModelConfig, layer: Layer, chunk: Chunk) -> list[Call]:
    """Return the calls of one layer in graph order."""
    calls = {(call.op, call.role): call for call in layer_calls(config, layer, chunk)}
    kept = {call.op: call for call in calls.values() if call.op in _KEPT}
    hyper = [
        Call("V4HyperPostPre", f"hc_{p}", **_of(calls["V4HyperPre", f"hc_{p}"])) for p in ("attn", "ffn")
    ]
    route = kept.get("V4RouteHash") or kept["V4RouteTopK"]
    experts = kept.get("V4MoE") or kept["V4MoEFp8"]
    select = [kept["V4IndexTopK"]] if "V4IndexTopK" in kept else []
    attend = next(call for op, call in kept.items() if op.endswith("Attention"))
    output = [kept["V4Fp8GroupedOutput"], calls["V4Fp8Linear", "attn.wo_b"]]
    return [hyper[0], *_attention(calls, layer), *select, attend, *output, hyper[1], route, experts]


def fused_head_calls(config: ModelConfig, chunk: Chunk) -> list[Call]:
    """Return the calls of the head: what the last layer left to V4HyperPost, then the last token's logits."""
    streams = {**chunk.sizes, "D": config.hidden_size}
    return [Call("V4HyperPost", "hc_ffn", streams, {}), *head_calls(config, chunk)]


def _of(call: Call) -> dict[str, Any]:
    return {"sizes": call.sizes, "attributes": call.attributes}


def _attention(calls: Mapping[tuple[str, str], Call], layer: Layer) -> list[Call]:
    """Projections, the latent's projections, and what prepares queries, keys and compressed entries."""
    wq_a, wkv, wq_b = (calls["V4Fp8Linear", f"attn.{name}"] for name in ("wq_a", "wkv", "wq_b"))
    prep, eps = calls["V4AttentionPrep", "attn"], calls["V4RmsNorm", "attn.q_norm"].attributes
    kind = {"window": "Window", "hca": "Hca", "csa": "Csa"}[layer.attention]
    rows = {**_fp8("Oq", wq_a), **_fp8("Okv", wkv)}
    queries = _fp8("Oq", wq_b)
    prepared = dict(prep.sizes)
    if layer.attention != "window":
        main = calls["V4Compress", "attn.compressor"].sizes
        rows["Oc"] = calls["V4LinearF32", "attn.compressor.wkv"].sizes["O"]
        prepared |= main
    if layer.attention == "csa":
        rows["Oi"] = calls["V4LinearF32", "attn.indexer.compressor.wkv"].sizes["O"]
        rows["Ow"] = calls["V4Linear", "attn.indexer.weights_proj"].sizes["O"]
        queries |= _fp8("Oi", calls["V4Fp8Linear", "attn.indexer.wq_b"])
        index = calls["V4Compress", "attn.indexer.compressor"].sizes
        prepared |= {"I": index["C"], "IC": index["CC"]}
    latent = "V4CsaQueryProjections" if layer.attention == "csa" else "V4QueryProjection"
    last = prep if layer.attention == "window" else Call(f"V4{kind}Prep", "attn", prepared, eps)
    return [
        Call(f"V4{kind}Projections", "attn", {**_input(wq_a), **rows}, {}),
        Call(latent, "attn.q_norm", {**_input(wq_b), **queries}, eps),
        last,
    ]


def _fp8(rows: str, call: Call) -> dict[str, int]:
    return {rows: call.sizes["O"], f"{rows}B": call.sizes["OB"]}


def _input(call: Call) -> dict[str, int]:
    return {name: call.sizes[name] for name in ("B", "S", "K", "KB")}
