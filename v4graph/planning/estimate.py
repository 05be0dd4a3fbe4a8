"""Time of a step on GPUs, estimated: a roofline per op, a cost per launch, links between GPUs.

    op     = max(bytes / (bandwidth * bandwidth_share), FLOPs / (bf16 rate * compute_share))
    step   = sum of its ops + launches * launch_us
    prompt = sum of its chunks, sampled at `_SAMPLES` contexts

v4graph's kernels multiply in bf16 whatever the weights are stored as, so the bf16 rate is what counts.
Source of `launch_us`: published decode times of V4 graphs, 3.7 us per node (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from v4graph.config import ModelConfig
from v4graph.planning.hardware import GpuSpec
from v4graph.planning.placement import Load, Placement
from v4graph.planning.work import OpWork, Step, Work, work

_SAMPLES = 5
_EXPERTS = ("V4MoE", "V4MoEFp8")


@dataclass(frozen=True)
class Assumptions:
    """What an estimate rests on beside published figures: shares of them that kernels reach, and latencies.

    `disk_gb_s` is what weights are read with, `hop_us` what a message between GPUs costs before its bytes.
    """

    launch_us: float = 3.7
    bandwidth_share: float = 0.7
    compute_share: float = 0.5
    hop_us: float = 10
    disk_gb_s: float = 5


BOUND = Assumptions(launch_us=0, bandwidth_share=1, compute_share=1, hop_us=0)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one decode step for all slots and of one prompt that fills the context; tokens/s in all."""

    decode_seconds: float
    tokens_per_second: float
    prefill_seconds: float
    prefill_tokens_per_second: float


def estimate(
    config: ModelConfig, load: Load, placement: Placement, gpu: GpuSpec, assume: Assumptions
) -> Estimate:
    """Estimate decode at the load's context, and the prefill of one slot to it."""
    step, rate = _decode(config, load, placement, gpu, assume)
    prefill = _prefill(config, load, placement, gpu, assume)
    return Estimate(step, rate, prefill, load.context / prefill)


def step_seconds(done: Work, gpu: GpuSpec, assume: Assumptions) -> float:
    """Return the seconds of a step on one GPU."""
    seconds = sum(count * _op_seconds(op, gpu, assume) for op, count in done.ops.items())
    return seconds + done.launches * assume.launch_us * 1e-6


def load_seconds(nbytes: int, placement: Placement, gpu: GpuSpec, assume: Assumptions) -> tuple[float, float]:
    """Return seconds to load weights from disk, and from the page cache: the fullest GPU's over its link."""
    over_link = placement.largest.weights / (gpu.host_gb_s * 1e9)
    return max(nbytes / (assume.disk_gb_s * 1e9), over_link), over_link


def _op_seconds(op: OpWork, gpu: GpuSpec, assume: Assumptions, share: float = 1) -> float:
    moved = op.bytes * share / (gpu.bandwidth_gb_s * 1e9 * assume.bandwidth_share)
    computed = op.flops * share / (gpu.bf16_tflops * 1e12 * assume.compute_share)
    return max(moved, computed)


def _decode(
    config: ModelConfig, load: Load, placement: Placement, gpu: GpuSpec, assume: Assumptions
) -> tuple[float, float]:
    """Return the seconds of a step and tokens/s of all slots."""
    gpus, slots = len(placement.gpus), load.batch
    if placement.kind == "pipeline" and slots >= gpus:
        # As many groups of slots as stages are under way at once.
        slots = -(-slots // gpus)
    seconds = _step(config, Step(slots, 1, load.context - 1), load, placement, gpu, assume)
    return seconds, load.batch / seconds


def _prefill(
    config: ModelConfig, load: Load, placement: Placement, gpu: GpuSpec, assume: Assumptions
) -> float:
    """Return the seconds of one prompt of `context` tokens in one slot."""
    size = min(load.chunk, load.context)
    chunks = load.context / size
    samples = min(_SAMPLES, -(-load.context // size))
    # The time of a chunk grows linearly with its context, but for the first few: midpoints are exact enough.
    starts = [int(max(0, (k + 0.5) / samples * load.context - size / 2)) for k in range(samples)]
    seconds = [_step(config, Step(1, size, start), load, placement, gpu, assume) for start in starts]
    return sum(seconds) / samples * chunks


def _step(
    config: ModelConfig, step: Step, load: Load, placement: Placement, gpu: GpuSpec, assume: Assumptions
) -> float:
    gpus = len(placement.gpus)
    done = work(config, step, load.cache)
    token = 2 * step.tokens * step.batch * config.hidden_size
    link, hop = gpu.link_gb_s * 1e9, assume.hop_us * 1e-6
    if placement.kind == "expert parallel":
        mine = work(config, Step(-(-step.batch // gpus), step.tokens, step.context), load.cache)
        seconds = sum(
            count * _op_seconds(op, gpu, assume) for op, count in mine.ops.items() if op.op not in _EXPERTS
        )
        seconds += sum(
            count * _op_seconds(op, gpu, assume, 1 / gpus)
            for op, count in done.ops.items()
            if op.op in _EXPERTS
        )
        seconds += mine.launches * assume.launch_us * 1e-6
        exchange = hop + config.num_experts_per_tok * token / gpus / link
        return seconds + 2 * len(config.layers) * exchange
    seconds = step_seconds(done, gpu, assume)
    if placement.kind == "pipeline":
        return seconds + (gpus - 1) * (hop + config.hc_mult * token / link)
    if placement.kind == "experts in host memory":
        tokens = step.batch * step.tokens
        hit = min(config.n_routed_experts, tokens * config.num_experts_per_tok)
        crossing = placement.crossing // config.num_experts_per_tok * hit
        return seconds + crossing / (gpu.host_gb_s * 1e9)
    return seconds
