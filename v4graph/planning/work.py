"""FLOPs, bytes and launches of one step, by part of the model, from the op calls of an optimised graph.

FLOPs are those of `v4graph.launch.cost`, two per multiplication and addition. Bytes are floors too: every
weight and cache row once. Launches are those of the launch plans and of the native layers of embedding and
head. Source of the FP8 equivalents: DeepSeek-V4's technical report, which counts bf16 attention twice and FP4
index keys half.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from v4graph.config import Layer, ModelConfig
from v4graph.errors import EngineError
from v4graph.launch import PLANS
from v4graph.launch.calls import Call, Chunk, head_calls, layer_calls
from v4graph.launch.cost import COSTS
from v4graph.launch.fused_calls import fused_head_calls, fused_layer_calls
from v4graph.planning.cache import ATTENTION_FLOP_WEIGHT, CacheFormat

# What TensorRT runs as layers of its own: look the ids up and make four streams; pick each slot's last token.
NATIVE_EMBED, NATIVE_HEAD = 10, 12
CAPACITY_STEP = 128
PARTS = ("linear", "attention", "indexer", "compressor", "hyper-connections", "experts")
_BF16 = CacheFormat("bf16", "bf16")


@dataclass(frozen=True)
class Step:
    """One call of the model: `batch` slots with `tokens` new tokens each and `context` before them."""

    batch: int
    tokens: int
    context: int

    @property
    def chunk(self) -> Chunk:
        """The chunk, with room for context and tokens and no more."""
        end = self.context + self.tokens
        return Chunk(self.batch, self.tokens, -(-end // CAPACITY_STEP) * CAPACITY_STEP)


@dataclass(frozen=True)
class OpWork:
    """One op call of an optimised graph; `layer` is None in the head.

    `refused` says why the kernels do not take these shapes; the op is then one launch, without workspace.
    """

    op: str
    layer: Layer | None
    bytes: int
    flops: int
    launches: int
    workspace: int
    refused: str = ""


@dataclass(frozen=True)
class Work:
    """A step of the whole model.

    `ops` maps each distinct op call to how often it runs; `cache_bytes` are the part of `bytes` that is read
    from caches, by kind of row.
    """

    step: Step
    ops: Mapping[OpWork, int]
    flops: Mapping[str, int]
    fp8_flops: float
    cache_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes that the step moves."""
        return sum(op.bytes * count for op, count in self.ops.items())

    @property
    def launches(self) -> int:
        """Kernel launches of the step, native layers included."""
        return NATIVE_EMBED + NATIVE_HEAD + sum(op.launches * count for op, count in self.ops.items())

    @property
    def workspace(self) -> int:
        """Bytes of the largest workspace; ops share one."""
        return max(op.workspace for op in self.ops)

    @property
    def refused(self) -> tuple[str, ...]:
        """Why ops have no kernels at these shapes: then launches and workspace are lower bounds."""
        return tuple(dict.fromkeys(op.refused for op in self.ops if op.refused))

    @property
    def total_flops(self) -> int:
        """FLOPs of the step."""
        return sum(self.flops.values())


@functools.lru_cache(maxsize=512)
def work(config: ModelConfig, step: Step, cache: CacheFormat) -> Work:
    """Count one step."""
    ops: Counter[OpWork] = Counter()
    rows: Counter[str] = Counter()
    for layer, count in Counter(config.layers).items():
        for call in fused_layer_calls(config, layer, step.chunk):
            ops[_op(config, layer, call, step, cache)] += count
        for name, nbytes in cache_rows(config, layer, step, cache).items():
            rows[name] += count * nbytes
    for call in fused_head_calls(config, step.chunk):
        ops[_op(config, None, call, step, cache)] += 1
    return Work(step, ops, *flops_by_part(config, step, cache), dict(rows))


def flops_by_part(config: ModelConfig, step: Step, cache: CacheFormat) -> tuple[dict[str, int], float]:
    """Return the FLOPs of a step by part, and in FP8 equivalents together; `step` may be any length."""
    flops = dict.fromkeys(PARTS, 0)
    equivalents = 0.0
    kinds: list[tuple[Layer | None, int]] = [(None, 1), *Counter(config.layers).items()]
    for layer, count in kinds:
        calls = layer_calls(config, layer, step.chunk) if layer else head_calls(config, step.chunk)
        for part, amount, weight in _flops(calls, layer, step, cache):
            flops[part] += count * amount
            equivalents += count * amount * weight
    return flops, equivalents


def cache_rows(config: ModelConfig, layer: Layer, step: Step, cache: CacheFormat) -> dict[str, int]:
    """Return the bytes that one layer reads from each of its caches."""
    end = step.context + step.tokens
    kv = cache.kv_row(config)
    found = {"window": step.batch * min(step.context, config.sliding_window) * kv}
    if layer.attention == "hca":
        found["compressed (HCA)"] = step.batch * (end // layer.ratio) * kv
    elif layer.attention == "csa":
        visible = end // layer.ratio
        chosen = min(step.tokens * min(config.index_topk, visible), visible)
        found["compressed (CSA)"] = step.batch * chosen * kv
        found["index keys"] = step.batch * visible * cache.index_row(config)
    return found


def _op(config: ModelConfig, layer: Layer | None, call: Call, step: Step, cache: CacheFormat) -> OpWork:
    nbytes, flops = _cost(call, layer, step)
    if layer is not None:
        # The cost formulas count rows of a bf16 graph.
        plain, chosen = (cache_rows(config, layer, step, kind) for kind in (_BF16, cache))
        nbytes += sum(chosen[name] - plain[name] for name in chosen if _reads(call.op, name))
    try:
        made = call.launches(PLANS)
    except EngineError as error:
        return OpWork(call.op, layer, nbytes, flops, 1, 0, str(error))
    return OpWork(call.op, layer, nbytes, flops, len(made.launches), made.workspace)


def _reads(op: str, rows: str) -> bool:
    return op == "V4IndexTopK" if rows == "index keys" else op.endswith("Attention")


def _cost(call: Call, layer: Layer | None, step: Step) -> tuple[int, int]:
    """Return bytes and FLOPs of a call, the selected rows' ratio included."""
    if layer is not None and call.op == "V4SelectedAttention":
        call = replace(call, sizes={**call.sizes, "ratio": layer.ratio})
    return COSTS[call.op].of(call, step.context)


def _flops(
    calls: list[Call], layer: Layer | None, step: Step, cache: CacheFormat
) -> Iterator[tuple[str, int, float]]:
    """Yield part, FLOPs and FP8 equivalents per FLOP of each call."""
    for call in calls:
        flops = _cost(call, layer, step)[1]
        weight: float = 1
        if call.op == "V4IndexTopK":
            weight = cache.index_flop_weight
        elif call.op.endswith("Attention"):
            weight = ATTENTION_FLOP_WEIGHT
        yield part_of_call(call), flops, weight


def part_of_call(call: Call) -> str:
    """Return the part of the model that an unfused op call belongs to."""
    if call.role.startswith("attn.indexer"):
        return "indexer"
    if call.role.startswith("attn.compressor"):
        return "compressor"
    if call.op.startswith("V4Hyper"):
        return "hyper-connections"
    if call.role.startswith("ffn"):
        return "experts"
    return "attention" if "Attention" in call.op or call.op == "V4RmsNorm" else "linear"
