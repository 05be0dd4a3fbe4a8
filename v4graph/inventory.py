"""The tensors that a checkpoint must hold, computed from the configuration alone.

Source: the published model.safetensors.index.json of DeepSeek-V4-Flash and -Pro, which
`inventory` reproduces exactly.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from v4graph.config import Layer, ModelConfig, WeightFormat

FP8_BLOCK = 128
FP4_BLOCK = 32
DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

# The first fragment found in a tensor's name says which part of the model it belongs to.
_PARTS = (
    ("mtp.", "multi-token prediction"),
    ("ffn.experts.", "routed experts"),
    ("ffn.shared_experts.", "shared experts"),
    ("ffn.gate.", "routers"),
    ("attn.indexer.", "indexers"),
    ("attn.compressor.", "compressors"),
    ("attn.", "attention"),
    ("hc_", "hyper-connections"),
    ("embed.", "embedding and head"),
    ("head.", "embedding and head"),
)


class Role(enum.Enum):
    """How a tensor is stored: matrices may be quantised, the rest has a fixed type."""

    LINEAR = "fp8-able"
    EXPERT = "fp4-able"
    FLOAT = "bf16"
    F32 = "float32"
    INT64 = "int64"


@dataclass(frozen=True)
class TensorSpec:
    """One weight: its official name, how it may be stored, and its unpacked shape."""

    name: str
    role: Role
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def part_of(name: str) -> str:
    """Return the part of the model that a tensor belongs to, such as "routed experts"."""
    return next((part for fragment, part in _PARTS if fragment in name), "norms")


def scale_name(weight: str) -> str:
    """Return the name of a weight's scale tensor."""
    return weight.removesuffix("weight") + "scale"


def layer_tensors(config: ModelConfig, layer: Layer) -> tuple[TensorSpec, ...]:
    """Return one layer's weights, relative to `layers.{i}.`; one `{e}` spec stands for all experts."""
    return (*_attention(config, layer), *_moe(config, layer), *_hyper_connections(config))


def _attention(config: ModelConfig, layer: Layer) -> Iterator[TensorSpec]:
    hidden, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
    inner = config.o_groups * config.o_lora_rank
    yield TensorSpec("attn_norm.weight", Role.FLOAT, (hidden,))
    yield TensorSpec("attn.attn_sink", Role.F32, (heads,))
    yield TensorSpec("attn.wq_a.weight", Role.LINEAR, (config.q_lora_rank, hidden))
    yield TensorSpec("attn.q_norm.weight", Role.FLOAT, (config.q_lora_rank,))
    yield TensorSpec("attn.wq_b.weight", Role.LINEAR, (heads * width, config.q_lora_rank))
    yield TensorSpec("attn.wkv.weight", Role.LINEAR, (width, hidden))
    yield TensorSpec("attn.kv_norm.weight", Role.FLOAT, (width,))
    yield TensorSpec("attn.wo_a.weight", Role.LINEAR, (inner, heads * width // config.o_groups))
    yield TensorSpec("attn.wo_b.weight", Role.LINEAR, (hidden, inner))
    if layer.attention != "window":
        yield from _compressor("attn.compressor.", config, layer, width)
    if layer.attention == "csa":
        index_width = config.index_n_heads * config.index_head_dim
        yield TensorSpec("attn.indexer.wq_b.weight", Role.LINEAR, (index_width, config.q_lora_rank))
        yield TensorSpec("attn.indexer.weights_proj.weight", Role.FLOAT, (config.index_n_heads, hidden))
        yield from _compressor("attn.indexer.compressor.", config, layer, config.index_head_dim)


def _compressor(prefix: str, config: ModelConfig, layer: Layer, width: int) -> Iterator[TensorSpec]:
    # CSA pools overlapping blocks: one half of the channels feeds the next block's entry.
    rows = 2 * width if layer.attention == "csa" else width
    yield TensorSpec(prefix + "ape", Role.F32, (layer.ratio, rows))
    yield TensorSpec(prefix + "wkv.weight", Role.FLOAT, (rows, config.hidden_size))
    yield TensorSpec(prefix + "wgate.weight", Role.FLOAT, (rows, config.hidden_size))
    yield TensorSpec(prefix + "norm.weight", Role.FLOAT, (width,))


def _moe(config: ModelConfig, layer: Layer) -> Iterator[TensorSpec]:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    yield TensorSpec("ffn_norm.weight", Role.FLOAT, (hidden,))
    yield TensorSpec("ffn.gate.weight", Role.FLOAT, (config.n_routed_experts, hidden))
    if layer.routing == "hash":
        shape = (config.vocab_size, config.num_experts_per_tok)
        yield TensorSpec("ffn.gate.tid2eid", Role.INT64, shape)
    else:
        yield TensorSpec("ffn.gate.bias", Role.F32, (config.n_routed_experts,))
    for name, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
        yield TensorSpec(f"ffn.experts.{{e}}.{name}.weight", Role.EXPERT, shape)
        yield TensorSpec(f"ffn.shared_experts.{name}.weight", Role.LINEAR, shape)


def _hyper_connections(config: ModelConfig) -> Iterator[TensorSpec]:
    mixes = (2 + config.hc_mult) * config.hc_mult
    for part in ("attn", "ffn"):
        yield TensorSpec(f"hc_{part}_fn", Role.F32, (mixes, config.hc_mult * config.hidden_size))
        yield TensorSpec(f"hc_{part}_base", Role.F32, (mixes,))
        yield TensorSpec(f"hc_{part}_scale", Role.F32, (3,))


def _collapse(config: ModelConfig) -> Iterator[TensorSpec]:
    yield TensorSpec("norm.weight", Role.FLOAT, (config.hidden_size,))
    yield TensorSpec("hc_head_fn", Role.F32, (config.hc_mult, config.hc_mult * config.hidden_size))
    yield TensorSpec("hc_head_base", Role.F32, (config.hc_mult,))
    yield TensorSpec("hc_head_scale", Role.F32, (1,))


def model_tensors(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return the weights outside the layers: embedding, head, final norm, collapse of the streams."""
    table = (config.vocab_size, config.hidden_size)
    return (
        TensorSpec("embed.weight", Role.FLOAT, table),
        TensorSpec("head.weight", Role.FLOAT, table),
        *_collapse(config),
    )


def mtp_tensors(config: ModelConfig, index: int) -> tuple[TensorSpec, ...]:
    """Return the weights of MTP layer `index`, relative to `mtp.{index}.`."""
    hidden = config.hidden_size
    return (
        *layer_tensors(config, config.mtp_layers[index]),
        TensorSpec("e_proj.weight", Role.LINEAR, (hidden, hidden)),
        TensorSpec("h_proj.weight", Role.LINEAR, (hidden, hidden)),
        TensorSpec("enorm.weight", Role.FLOAT, (hidden,)),
        TensorSpec("hnorm.weight", Role.FLOAT, (hidden,)),
        *_collapse(config),
    )


def weight_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Yield every weight under its full official name, experts one by one, MTP layers last."""
    yield from model_tensors(config)
    for i, layer in enumerate(config.layers):
        yield from _expand(f"layers.{i}.", layer_tensors(config, layer), config.n_routed_experts)
    for k in range(len(config.mtp_layers)):
        yield from _expand(f"mtp.{k}.", mtp_tensors(config, k), config.n_routed_experts)


def _expand(prefix: str, specs: tuple[TensorSpec, ...], experts: int) -> Iterator[TensorSpec]:
    for spec in specs:
        if spec.role is Role.EXPERT:
            for e in range(experts):
                yield replace(spec, name=prefix + spec.name.replace("{e}", str(e)))
        else:
            yield replace(spec, name=prefix + spec.name)


def stored(spec: TensorSpec, weights: WeightFormat) -> tuple[StoredTensor, ...]:
    """Return the stored form of a weight: one tensor, or a quantised one and its scale."""
    if spec.role is Role.F32:
        return (StoredTensor(spec.name, "F32", spec.shape),)
    if spec.role is Role.INT64:
        return (StoredTensor(spec.name, "I64", spec.shape),)
    kind = {Role.LINEAR: weights.linear, Role.EXPERT: weights.expert}.get(spec.role, "float")
    if kind == "float":
        return (StoredTensor(spec.name, "BF16", spec.shape),)
    rows, columns = spec.shape
    if kind == "fp4":
        # Two e2m1 codes per byte; one e8m0 scale per row and 32 columns.
        weight = StoredTensor(spec.name, "I8", (rows, columns // 2))
        return weight, StoredTensor(scale_name(spec.name), "F8_E8M0", (rows, columns // FP4_BLOCK))
    scale_dtype = "F8_E8M0" if weights.scale == "e8m0" else "F32"
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    weight = StoredTensor(spec.name, "F8_E4M3", spec.shape)
    return weight, StoredTensor(scale_name(spec.name), scale_dtype, blocks)


def inventory(config: ModelConfig, weights: WeightFormat | None = None) -> Iterator[StoredTensor]:
    """Yield every tensor of a checkpoint, MTP layers included.

    `weights` is the format in use, by default the one that the config announces.
    """
    for spec in weight_specs(config):
        yield from stored(spec, weights or config.weight_format)
