"""The op calls of a model, from its configuration: what the planner, the passes and the benchmarks count.

They mirror the exported graph in v4 numerics with FP8 linears; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4graph.config import Layer, ModelConfig
from v4graph.launch.plan import Launches, evaluate_plan
from v4graph.ops import OPS_BY_NAME, OpSpec
from v4graph.ops.spec import evaluate_dim

BLOCK, FP4_BLOCK, SLACK = 128, 32, 8


@dataclass(frozen=True)
class Call:
    """One op call: `role` is the weight or part it is for, `sizes` the values of the ports' symbols."""

    op: str
    role: str
    sizes: Mapping[str, int]
    attributes: Mapping[str, Any]

    @property
    def spec(self) -> OpSpec:
        """The op's contract."""
        return OPS_BY_NAME[self.op]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the inputs."""
        return [tuple(evaluate_dim(dim, self.sizes) for dim in port.dims) for port in self.spec.inputs]

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of the inputs in a bf16 graph with e8m0 scales."""
        return ["bfloat16" if "bfloat16" in port.dtypes else port.dtypes[0] for port in self.spec.inputs]

    @property
    def key(self) -> tuple[Any, ...]:
        """What calls of the same work share, whatever weights they are for."""
        return (self.op, *sorted(self.sizes.items()), *self.attributes.values())

    def launches(self, plans: Mapping[str, Any]) -> Launches:
        """Return what the call launches by its op's plan."""
        return evaluate_plan(plans[self.op], self.spec, self.attributes, self.shapes, self.dtypes)


def parts_of(call: Call) -> list[Call]:
    """Return the calls that a call of a fused op stands for."""
    ports = (*call.spec.inputs, *call.spec.outputs)
    symbols = {**call.sizes, **call.attributes}
    shapes: dict[str, tuple[int, ...]] = {
        port.name: tuple(evaluate_dim(dim, symbols) for dim in port.dims) for port in ports
    }
    parts = []
    for part in call.spec.parts:
        given = {port.name: shapes[name] for port, name in zip(part.spec.inputs, part.inputs, strict=True)}
        attributes = part.attribute_values(call.attributes)
        shapes |= zip(part.outputs, part.spec.output_shapes(given, attributes), strict=True)
        parts.append(Call(part.spec.name, call.role, part.spec.bind_shapes(given), attributes))
    return parts


@dataclass(frozen=True)
class Chunk:
    """A step: `batch` slots with `tokens` new tokens each and room for `capacity` tokens."""

    batch: int
    tokens: int
    capacity: int

    @property
    def sizes(self) -> dict[str, int]:
        """The symbols B and S."""
        return {"B": self.batch, "S": self.tokens}


def layer_calls(config: ModelConfig, layer: Layer, chunk: Chunk) -> list[Call]:
    """Return the calls of one layer in graph order."""
    return [
        _hyper_pre(config, chunk, "attn"),
        *_attention(config, layer, chunk),
        _hyper_post(config, chunk, "attn"),
        _hyper_pre(config, chunk, "ffn"),
        *_moe(config, layer, chunk),
        _hyper_post(config, chunk, "ffn"),
    ]


def head_calls(config: ModelConfig, chunk: Chunk) -> list[Call]:
    """Return the calls of the head for the last token of every slot."""
    last = {"B": chunk.batch, "S": 1, "D": config.hidden_size}
    eps = {"eps": config.rms_norm_eps, "hc_eps": config.hc_eps}
    logits = {"B": chunk.batch, "S": 1, "K": config.hidden_size, "O": config.vocab_size}
    return [Call("V4HyperHead", "hc_head", last, eps), Call("V4LinearF32", "head", logits, {})]


def _hyper_pre(c: ModelConfig, chunk: Chunk, part: str) -> Call:
    attributes = {"iters": c.hc_sinkhorn_iters, "eps": c.rms_norm_eps, "hc_eps": c.hc_eps}
    return Call("V4HyperPre", f"hc_{part}", {**chunk.sizes, "D": c.hidden_size}, attributes)


def _hyper_post(c: ModelConfig, chunk: Chunk, part: str) -> Call:
    return Call("V4HyperPost", f"hc_{part}", {**chunk.sizes, "D": c.hidden_size}, {})


def _fp8(chunk: Chunk, role: str, inputs: int, outputs: int) -> Call:
    blocks = {"OB": -(-outputs // BLOCK), "KB": inputs // BLOCK}
    return Call("V4Fp8Linear", role, {**chunk.sizes, "K": inputs, "O": outputs, **blocks}, {})


def _linear(chunk: Chunk, op: str, role: str, inputs: int, outputs: int) -> Call:
    return Call(op, role, {**chunk.sizes, "K": inputs, "O": outputs}, {})


def _attention(c: ModelConfig, layer: Layer, chunk: Chunk) -> list[Call]:
    heads, width, turned = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim // 2
    prep = {"Q": heads * width, "Dh": width, "F": turned, **chunk.sizes}
    calls = [
        _fp8(chunk, "attn.wq_a", c.hidden_size, c.q_lora_rank),
        Call("V4RmsNorm", "attn.q_norm", {**chunk.sizes, "D": c.q_lora_rank}, {"eps": c.rms_norm_eps}),
        _fp8(chunk, "attn.wq_b", c.q_lora_rank, heads * width),
        _fp8(chunk, "attn.wkv", c.hidden_size, width),
        Call("V4AttentionPrep", "attn", prep, {"quantise": 1, "eps": c.rms_norm_eps}),
    ]
    attend = {**chunk.sizes, "H": heads, "Dh": width, "F": turned, "L": c.sliding_window + SLACK}
    scaling = {"window": c.sliding_window, "scale": width**-0.5}
    if layer.attention != "window":
        attend["N"] = chunk.capacity // layer.ratio
        calls += _compress(c, layer, chunk, "attn.compressor", width, "kv")
    if layer.attention == "csa":
        calls += _compress(c, layer, chunk, "attn.indexer.compressor", c.index_head_dim, "index")
        calls += _select(c, layer, chunk)
        calls.append(Call("V4SelectedAttention", "attn", {**attend, "K": c.index_topk}, scaling))
    elif layer.attention == "hca":
        calls.append(Call("V4CompressedAttention", "attn", attend, {**scaling, "ratio": layer.ratio}))
    else:
        calls.append(Call("V4WindowAttention", "attn", attend, scaling))
    rows, group = c.o_groups * c.o_lora_rank, heads * width // c.o_groups
    grouped = {**chunk.sizes, "H": heads, "Dh": width, "O": rows, "K": group}
    grouped |= {"OB": -(-rows // BLOCK), "KB": group // BLOCK}
    calls.append(Call("V4Fp8GroupedOutput", "attn.wo_a", grouped, {"groups": c.o_groups}))
    return [*calls, _fp8(chunk, "attn.wo_b", rows, c.hidden_size)]


def _compress(c: ModelConfig, layer: Layer, chunk: Chunk, role: str, width: int, quantise: str) -> list[Call]:
    parts = 2 if layer.attention == "csa" else 1
    sizes = {**chunk.sizes, "C": width, "CC": parts * width, "F": c.qk_rope_head_dim // 2}
    sizes |= {"R": layer.ratio, "L": parts * layer.ratio + SLACK, "N": chunk.capacity // layer.ratio}
    attributes = {"overlap": int(parts == 2), "quantise": quantise, "eps": c.rms_norm_eps}
    return [
        _linear(chunk, "V4LinearF32", f"{role}.wkv", c.hidden_size, parts * width),
        _linear(chunk, "V4LinearF32", f"{role}.wgate", c.hidden_size, parts * width),
        Call("V4Compress", role, sizes, attributes),
    ]


def _select(c: ModelConfig, layer: Layer, chunk: Chunk) -> list[Call]:
    sizes = {**chunk.sizes, "Q": c.index_n_heads * c.index_head_dim, "Hi": c.index_n_heads}
    sizes |= {"C": c.index_head_dim, "F": c.qk_rope_head_dim // 2, "N": chunk.capacity // layer.ratio}
    scale = c.index_head_dim**-0.5 * c.index_n_heads**-0.5
    attributes = {"topk": c.index_topk, "ratio": layer.ratio, "quantise": 1, "scale": scale}
    return [
        _fp8(chunk, "attn.indexer.wq_b", c.q_lora_rank, c.index_n_heads * c.index_head_dim),
        _linear(chunk, "V4Linear", "attn.indexer.weights_proj", c.hidden_size, c.index_n_heads),
        Call("V4IndexTopK", "attn.indexer", sizes, attributes),
    ]


def _moe(c: ModelConfig, layer: Layer, chunk: Chunk) -> list[Call]:
    width, inner, experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    shared, chosen = inner * c.n_shared_experts, c.num_experts_per_tok
    route = {**chunk.sizes, "D": width, "E": experts, "K": chosen}
    scale = {"scale": c.routed_scaling_factor}
    if layer.routing == "hash":
        first = Call("V4RouteHash", "ffn.gate", {**route, "V": c.vocab_size}, scale)
    else:
        first = Call("V4RouteTopK", "ffn.gate", route, {"topk": chosen, **scale})
    blocks = {"IsB": -(-shared // BLOCK), "DB": -(-width // BLOCK)}
    limit, sizes = {"limit": c.swiglu_limit}, {**route, "I": inner, "Is": shared, **blocks}
    if c.weight_format.expert == "fp8":
        return [first, Call("V4MoEFp8", "ffn.experts", {**sizes, "IB": -(-inner // BLOCK)}, limit)]
    packed = {"D2": width // 2, "DS": width // FP4_BLOCK, "I2": inner // 2, "IS": inner // FP4_BLOCK}
    return [first, Call("V4MoE", "ffn.experts", {**sizes, **packed}, limit)]
