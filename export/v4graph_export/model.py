"""DeepSeek-V4 as functions of tensors: one layer, the embedding, the head.

Weights and states are arguments, in dictionaries keyed by the checkpoint's names, so the same code
runs in eager torch and is traced on fake tensors. Source: spec sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from v4graph.config import Layer, ModelConfig
from v4graph.ops import OPS_BY_NAME
from v4graph_export.flavour import Flavour
from v4graph_export.registration import operator

Tensors = Mapping[str, Tensor]


def call(name: str, *inputs: Tensor, **attributes: Any) -> Any:
    """Call a custom op; attributes go by name and must be complete."""
    spec = OPS_BY_NAME[name]
    assert attributes.keys() == spec.attributes.keys(), f"{name} takes attributes {list(spec.attributes)}"
    return operator(spec)(*inputs, *(attributes[key] for key in spec.attributes))


@dataclass(frozen=True)
class Chunk:
    """What a layer needs besides the streams: tokens int64 [B,S], start and num int32 [B], freqs [R/2]."""

    tokens: Tensor
    start: Tensor
    num: Tensor
    freqs: Tensor


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer of a given kind."""

    config: ModelConfig
    layer: Layer
    flavour: Flavour

    def __call__(self, x: Tensor, chunk: Chunk, weights: Tensors, states: Tensors) -> tuple[Tensor, Tensors]:
        """Return the next streams [B, S, 4, D] and every state's next value."""
        h, post, comb = self._hyper_pre(x, weights, "attn")
        y, following = self._attention(h, chunk, weights, states)
        x = call("V4HyperPost", y, x, post, comb)
        h, post, comb = self._hyper_pre(x, weights, "ffn")
        return call("V4HyperPost", self._moe(h, chunk, weights), x, post, comb), following

    def _hyper_pre(self, x: Tensor, weights: Tensors, part: str) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        mixing = (weights[f"hc_{part}_{name}"] for name in ("fn", "base", "scale"))
        norm = weights[f"{part}_norm.weight"]
        y, post, comb = call(
            "V4HyperPre", x, *mixing, norm, iters=c.hc_sinkhorn_iters, eps=c.rms_norm_eps, hc_eps=c.hc_eps
        )
        return y, post, comb

    def _linear(self, x: Tensor, weights: Tensors, name: str) -> Tensor:
        y: Tensor
        if self.flavour.quantised:
            y = call("V4Fp8Linear", x, weights[f"{name}.weight"], weights[f"{name}.scale"])
        else:
            y = call("V4Linear", x, weights[f"{name}.weight"])
        return y

    def _attention(
        self, h: Tensor, chunk: Chunk, weights: Tensors, states: Tensors
    ) -> tuple[Tensor, Tensors]:
        c, eps = self.config, self.config.rms_norm_eps
        latent = call(
            "V4RmsNorm", self._linear(h, weights, "attn.wq_a"), weights["attn.q_norm.weight"], eps=eps
        )
        q, kv = call(
            "V4AttentionPrep",
            self._linear(latent, weights, "attn.wq_b"),
            self._linear(h, weights, "attn.wkv"),
            weights["attn.kv_norm.weight"],
            chunk.freqs,
            chunk.start,
            quantise=int(self.flavour.quantised),
            eps=eps,
        )
        following: dict[str, Tensor] = {}
        common = (q, kv, weights["attn.attn_sink"], chunk.freqs, chunk.start, chunk.num, states["window"])
        scaling = {"window": c.sliding_window, "scale": c.head_dim**-0.5}
        if self.layer.attention != "window":
            following |= self._compress(h, chunk, weights, states, index=False)
        if self.layer.attention == "csa":
            following |= self._compress(h, chunk, weights, states, index=True)
            rows = self._select(h, latent, chunk, weights, following["index_keys"])
            o, ring = call("V4SelectedAttention", *common, following["compressed"], rows, **scaling)
        elif self.layer.attention == "hca":
            ratio = self.layer.ratio
            o, ring = call("V4CompressedAttention", *common, following["compressed"], ratio=ratio, **scaling)
        else:
            o, ring = call("V4WindowAttention", *common, **scaling)
        following["window"] = ring
        return self._linear(self._grouped(o, weights), weights, "attn.wo_b"), following

    def _grouped(self, o: Tensor, weights: Tensors) -> Tensor:
        groups, weight = self.config.o_groups, weights["attn.wo_a.weight"]
        z: Tensor
        if self.flavour.quantised:
            z = call("V4Fp8GroupedOutput", o, weight, weights["attn.wo_a.scale"], groups=groups)
        else:
            z = call("V4GroupedOutput", o, weight, groups=groups)
        return z

    def _compress(
        self, h: Tensor, chunk: Chunk, weights: Tensors, states: Tensors, *, index: bool
    ) -> Tensors:
        name = "attn.indexer.compressor" if index else "attn.compressor"
        prefix, cache = ("index_", "index_keys") if index else ("", "compressed")
        quantise = ("index" if index else "kv") if self.flavour.quantised else "none"
        # fp32: the compressor's projections and pooling are float32 in the official code.
        compressed, tail_kv, tail_gate = call(
            "V4Compress",
            call("V4LinearF32", h, weights[f"{name}.wkv.weight"]),
            call("V4LinearF32", h, weights[f"{name}.wgate.weight"]),
            weights[f"{name}.ape"],
            weights[f"{name}.norm.weight"],
            chunk.freqs,
            chunk.start,
            chunk.num,
            states[f"{prefix}tail_kv"],
            states[f"{prefix}tail_gate"],
            states[cache],
            overlap=int(self.layer.attention == "csa"),
            quantise=quantise,
            eps=self.config.rms_norm_eps,
        )
        return {cache: compressed, f"{prefix}tail_kv": tail_kv, f"{prefix}tail_gate": tail_gate}

    def _select(self, h: Tensor, latent: Tensor, chunk: Chunk, weights: Tensors, keys: Tensor) -> Tensor:
        c = self.config
        rows: Tensor = call(
            "V4IndexTopK",
            self._linear(latent, weights, "attn.indexer.wq_b"),
            call("V4Linear", h, weights["attn.indexer.weights_proj.weight"]),
            keys,
            chunk.freqs,
            chunk.start,
            topk=c.index_topk,
            ratio=self.layer.ratio,
            quantise=int(self.flavour.quantised),
            scale=c.index_head_dim**-0.5 * c.index_n_heads**-0.5,
        )
        return rows

    def _moe(self, h: Tensor, chunk: Chunk, weights: Tensors) -> Tensor:
        c, gate, scale = self.config, weights["ffn.gate.weight"], self.config.routed_scaling_factor
        if self.layer.routing == "hash":
            ids, gains = call("V4RouteHash", h, gate, weights["ffn.gate.tid2eid"], chunk.tokens, scale=scale)
        else:
            topk = c.num_experts_per_tok
            ids, gains = call("V4RouteTopK", h, gate, weights["ffn.gate.bias"], topk=topk, scale=scale)
        name = (
            {"fp4": "V4MoE", "fp8": "V4MoEFp8"}[self.flavour.weights.expert]
            if self.flavour.quantised
            else "V4MoEFloat"
        )
        parts = ("weight", "scale") if self.flavour.quantised else ("weight",)
        matrices = [
            weights[f"ffn.{owner}.{matrix}.{part}"]
            for owner in ("experts", "shared_experts")
            for matrix in ("w1", "w3", "w2")
            for part in parts
        ]
        y: Tensor = call(name, h, ids, gains, *matrices, limit=c.swiglu_limit)
        return y


def embed(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Return four equal streams [B, S, 4, D] of the token embeddings; `dtype` is the graph's."""
    return table[tokens].to(dtype)[:, :, None].expand(-1, -1, 4, -1).contiguous()


def head(config: ModelConfig, x: Tensor, num: Tensor, weights: Tensors, *, all_logits: bool) -> Tensor:
    """Return float32 logits: [B, V] of each slot's last valid token, or [B, S, V]."""
    if not all_logits:
        last = (num.long() - 1).clamp(min=0)
        x = x[torch.arange(x.shape[0]), last][:, None]
    mixing = (weights[f"hc_head_{name}"] for name in ("fn", "base", "scale"))
    norm = weights["norm.weight"]
    y = call("V4HyperHead", x, *mixing, norm, eps=config.rms_norm_eps, hc_eps=config.hc_eps)
    # fp32: the official code multiplies by the bf16 head in float32.
    logits: Tensor = call("V4LinearF32", y, weights["head.weight"])
    return logits if all_logits else logits[:, 0]
