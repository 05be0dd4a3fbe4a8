"""Which bytes lie on which GPU: layers in a pipeline, experts spread, or experts in host memory.

Weights, states and the largest workspace of a launch plan are exact; activations and reserve are estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from v4graph.config import ModelConfig, WeightFormat
from v4graph.planning.cache import CacheFormat, layer_state
from v4graph.planning.hardware import GpuSpec
from v4graph.planning.weights import Resident, resident
from v4graph.planning.work import Step, work
from v4graph.states import round_capacity

Kind = Literal["one GPU", "pipeline", "expert parallel", "experts in host memory"]
MAX_INPUT_LEN, MAX_NUM_TOKENS = 2048, 16384
RESERVE = 1_000_000_000
MOST_GPUS = 1024


@dataclass(frozen=True)
class Load:
    """What is asked of the engine: slots, tokens of context in each, cache precision."""

    batch: int
    context: int
    cache: CacheFormat

    def capacity(self, config: ModelConfig) -> int:
        """Return the tokens that a slot has room for: as the exporter rounds them."""
        return round_capacity(config, self.context)

    @property
    def chunk(self) -> int:
        """Tokens per slot of one prefill call: as `v4graph build` sets its profile."""
        return max(1, min(MAX_INPUT_LEN, MAX_NUM_TOKENS // self.batch, self.context))


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU; `what` says which part of the model it holds."""

    what: str
    weights: int
    states: int
    workspace: int
    activations: int
    reserve: int = RESERVE

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.states + self.workspace + self.activations + self.reserve


@dataclass(frozen=True)
class Placement:
    """A split over GPUs; `host` bytes stay in host memory and `crossing` of them cross per decoded token."""

    kind: Kind
    gpus: tuple[Memory, ...]
    host: int = 0
    crossing: int = 0

    @property
    def largest(self) -> Memory:
        """The fullest GPU."""
        return max(self.gpus, key=lambda memory: memory.total)

    def fits(self, gpu: GpuSpec) -> bool:
        """Whether every part fits its GPU."""
        return self.largest.total <= gpu.memory


class Placer:
    """Splits one model under one load; counts weights and workspace once."""

    def __init__(self, config: ModelConfig, weights: WeightFormat, load: Load) -> None:
        self._config, self._load = config, load
        self._bytes: Resident = resident(config, weights)
        self._states = [
            load.batch * layer_state(config, layer, load.cache).total(load.capacity(config))
            for layer in config.layers
        ]
        step = Step(load.batch, load.chunk, 0)
        self._workspace = work(config, step, load.cache).workspace
        self._activations = activation_bytes(config, step)

    @property
    def resident(self) -> Resident:
        """Weight bytes of the model."""
        return self._bytes

    def one(self) -> Placement:
        """Everything on one GPU."""
        return Placement("one GPU", (self._memory("the model", self._bytes.total, sum(self._states)),))

    def pipeline(self, gpus: int) -> Placement:
        """Consecutive layers on each GPU, so that the fullest holds as little as can be."""
        layers = [
            dense + experts + states
            for dense, experts, states in zip(
                self._bytes.dense, self._bytes.experts, self._states, strict=True
            )
        ]
        embed = 2 * self._config.vocab_size * self._config.hidden_size
        ends = (embed, self._bytes.outside - embed)
        layers[0] += ends[0]
        layers[-1] += ends[1]
        parts = _cut(layers, gpus)
        return Placement("pipeline", tuple(self._stage(first, last, ends) for first, last in parts))

    def _stage(self, first: int, last: int, ends: tuple[int, int]) -> Memory:
        weights = sum(self._bytes.dense[first:last]) + sum(self._bytes.experts[first:last])
        weights += ends[0] * (first == 0) + ends[1] * (last == len(self._states))
        return self._memory(f"layers {first}-{last - 1}", weights, sum(self._states[first:last]))

    def experts(self, gpus: int) -> Placement:
        """Routed experts spread, everything else on every GPU, slots divided among them."""
        total = self._config.n_routed_experts
        here = self._bytes.outside + sum(self._bytes.dense)
        slots = -(-self._load.batch // gpus)
        states = sum(self._states) // self._load.batch * slots
        parts = []
        for first, last in _even(total, gpus):
            share = (last - first) * self._bytes.one_expert * len(self._states)
            parts.append(self._memory(f"experts {first}-{last - 1}", here + share, states))
        return Placement("expert parallel", tuple(parts))

    def host_experts(self) -> Placement:
        """Routed experts in host memory; a GPU has the rest, and room for one layer's chosen experts."""
        chosen = min(self._load.batch * self._config.num_experts_per_tok, self._config.n_routed_experts)
        here = self._bytes.outside + sum(self._bytes.dense) + chosen * self._bytes.one_expert
        memory = self._memory("all but the routed experts", here, sum(self._states))
        crossing = len(self._states) * self._config.num_experts_per_tok * self._bytes.one_expert
        return Placement("experts in host memory", (memory,), sum(self._bytes.experts), crossing)

    def split(self, kind: Kind, gpus: int) -> Placement:
        """Return the split of this kind; one GPU for a single one."""
        if kind == "experts in host memory":
            return self.host_experts()
        if gpus == 1:
            return self.one()
        return self.experts(gpus) if kind == "expert parallel" else self.pipeline(gpus)

    def fewest(self, kind: Kind, gpu: GpuSpec) -> Placement | None:
        """Return the split over the fewest GPUs that fits; None if none does."""
        most = len(self._states) if kind == "pipeline" else self._config.n_routed_experts
        splits: Iterator[Placement] = (self.split(kind, n) for n in range(1, min(most, MOST_GPUS) + 1))
        return next((split for split in splits if split.fits(gpu)), None)

    def _memory(self, what: str, weights: int, states: int) -> Memory:
        return Memory(what, weights, states, self._workspace, self._activations)


def activation_bytes(config: ModelConfig, step: Step) -> int:
    """Estimate what TensorRT keeps between plugins: twice the streams and the queries, in bf16."""
    tokens = step.batch * step.tokens
    streams = config.hc_mult * config.hidden_size
    return 2 * tokens * 2 * (streams + config.num_attention_heads * config.head_dim)


def largest(low: int, high: int, fits: Callable[[int], bool], step: int = 1) -> int:
    """Return the largest multiple of `step` in [low, high] that fits, 0 if not even `low` does."""
    if not fits(low):
        return 0
    low, high = low // step, high // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def _even(total: int, parts: int) -> Iterator[tuple[int, int]]:
    for k in range(parts):
        yield total * k // parts, total * (k + 1) // parts


def _cut(sizes: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Cut a row into at most `parts` runs whose largest sum is least."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        limit = (low + high) // 2
        low, high = (low, limit) if len(_runs(sizes, limit)) <= parts else (limit + 1, high)
    return _runs(sizes, low)


def _runs(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    runs, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if total + size > limit and i > first:
            runs.append((first, i))
            first, total = i, 0
        total += size
    return [*runs, (first, len(sizes))]
