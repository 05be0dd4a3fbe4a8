"""The whole plan of a model as JSON data: what is exact, what is estimated, and where it would fit.

Keys of estimates are under "estimates" or end in "_estimate"; everything else is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from v4graph.config import ModelConfig, WeightFormat
from v4graph.errors import ConfigError
from v4graph.planning import reference
from v4graph.planning.cache import bytes_per_token, layer_state, state_bytes
from v4graph.planning.comparison import FORMATS, compare, published_flops
from v4graph.planning.estimate import BOUND, Assumptions, estimate, load_seconds
from v4graph.planning.hardware import GpuSpec, known
from v4graph.planning.placement import Kind, Load, Placement, Placer, largest
from v4graph.planning.weights import parameters, plan_format, tally
from v4graph.planning.work import CAPACITY_STEP, Step, flops_by_part, work

MOST_BATCH = 4096
_SPLITS: tuple[Kind, ...] = ("pipeline", "expert parallel")
# Plans of nano, Flash and Pro built by TensorRT for RTX 1.7: a line through their bytes and peak memory.
_PLAN_BYTES, _PLAN_BYTES_PER_OP = 700_000, 26_450
_BUILD_BYTES, _BUILD_BYTES_PER_OP = 284_000_000, 228_000


@dataclass(frozen=True)
class Request:
    """What to plan for; `price` is USD per GPU hour."""

    load: Load
    gpu: GpuSpec
    gpus: int
    price: float | None = None
    assume: Assumptions = field(default_factory=Assumptions)


def check(config: ModelConfig, load: Load) -> None:
    """Refuse what no engine could do.

    Raises:
        ConfigError: a context beyond the model's, or a batch or context below 1.
    """
    for name, value in (("--batch", load.batch), ("--context", load.context)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1.")
    most = config.max_position_embeddings
    if load.context > most:
        raise ConfigError(
            f"--context {load.context:,} is beyond the model's max_position_embeddings of {most:,}; give "
            f"--context {most} or less, or raise that key in config.json if the model was trained for it."
        )


def make_report(name: str, config: ModelConfig, weights: WeightFormat, request: Request) -> dict[str, Any]:
    """Return the plan of a model; `weights` is how its checkpoint stores them.

    Raises:
        ConfigError: as `check`.
    """
    load, gpu = request.load, request.gpu
    check(config, load)
    stored = plan_format(config, weights)
    placer = Placer(config, stored, load)
    splits = asked(placer, request)
    fitting = [(split, gpu) for split in splits if split.fits(gpu)]
    nearest = [] if fitting else list(_nearest(placer, request))
    return {
        "model": _model(name, config, load),
        "checkpoint": _checkpoint(config, stored, quantised=weights.quantised),
        "resident": {
            "bytes": placer.resident.total,
            "experts": sum(placer.resident.experts),
            "one_expert": placer.resident.one_expert,
            "others": placer.resident.total - sum(placer.resident.experts),
        },
        "state": _state(config, load),
        "decode": _decode(config, load),
        "prefill": _prefill(config, load),
        "engine_estimate": _engine(config, load),
        "placement": {
            "gpu": asdict(gpu),
            "asked": [_described(split, gpu) for split in splits],
            "fits": bool(fitting),
            "nearest": [_described(split, on) for split, on in nearest],
            "weights_alone_need": math.ceil(placer.resident.total / gpu.memory),
            "longest_context": _longest(config, stored, request),
            "largest_batch": _most_slots(config, stored, request),
        },
        "estimates": _estimates(config, placer.resident.total, request, fitting or nearest),
        "against_v3_2": _against(config, load.context),
    }


def _model(name: str, config: ModelConfig, load: Load) -> dict[str, Any]:
    return {
        "name": name,
        "layers": len(config.layers),
        "attention": dict(Counter(layer.attention for layer in config.layers)),
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "batch": load.batch,
        "context": load.context,
        "max_context": config.max_position_embeddings,
        "kv_cache": load.cache.kv,
        "index_keys": load.cache.index,
        "caches_exist": load.cache.exists,
    }


def _checkpoint(config: ModelConfig, stored: WeightFormat, *, quantised: bool) -> dict[str, Any]:
    whole, found = tally(config, stored), parameters(config)
    return {
        "stored": {"linear": stored.linear, "expert": stored.expert, "as_announced": quantised},
        "tensors": whole.tensors,
        "bytes": whole.bytes,
        "tensors_by_type": dict(whole.by_type),
        "bytes_by_part": dict(whole.by_part.most_common()),
        "parameters": {**asdict(found), "total": found.main + found.mtp},
    }


def _state(config: ModelConfig, load: Load) -> dict[str, Any]:
    kinds, capacity = [], load.capacity(config)
    for kind, count in Counter(layer.attention for layer in config.layers).items():
        layer = next(layer for layer in config.layers if layer.attention == kind)
        one = layer_state(config, layer, load.cache)
        kinds.append(
            {
                "kind": kind,
                "layers": count,
                "bytes_per_token": one.per_token,
                "caches": one.cache(capacity),
                "window": one.window,
                "tails": one.tails,
                "bytes": one.total(capacity),
            }
        )
    return {
        "capacity": capacity,
        "kinds": kinds,
        "bytes_per_slot": state_bytes(config, load.cache, capacity),
        "bytes_per_token": bytes_per_token(config, load.cache),
        "by_precision": [
            {
                "kv_cache": cache.kv,
                "index_keys": cache.index,
                "exists": cache.exists,
                "bytes_per_slot": state_bytes(config, cache, capacity),
                "bytes_per_token": bytes_per_token(config, cache),
            }
            for cache in FORMATS
        ],
    }


def _decode(config: ModelConfig, load: Load) -> dict[str, Any]:
    """One token of one slot; bytes of the whole batch beside it."""
    one = work(config, Step(1, 1, load.context - 1), load.cache)
    all_slots = work(config, Step(load.batch, 1, load.context - 1), load.cache)
    return {
        "flops": dict(one.flops),
        "total_flops": one.total_flops,
        "fp8_flops": one.fp8_flops,
        "bytes": one.bytes,
        "cache_bytes": dict(one.cache_bytes),
        "bytes_of_batch": all_slots.bytes,
        "launches": all_slots.launches,
        "refused_by_kernels": list(all_slots.refused),
        "workspace": one.workspace,
    }


def _prefill(config: ModelConfig, load: Load) -> dict[str, Any]:
    """One prompt that fills the context of one slot."""
    flops, equivalents = flops_by_part(config, Step(1, load.context, 0), load.cache)
    return {
        "tokens": load.context,
        "chunk": load.chunk,
        "calls": -(-load.context // load.chunk),
        "flops_per_token": {part: amount / load.context for part, amount in flops.items()},
        "total_flops": sum(flops.values()),
        "fp8_flops": equivalents,
    }


def _engine(config: ModelConfig, load: Load) -> dict[str, Any]:
    ops = sum(work(config, Step(1, 1, load.context - 1), load.cache).ops.values())
    return {
        "plugin_layers": ops,
        "plan_bytes": _PLAN_BYTES + ops * _PLAN_BYTES_PER_OP,
        "build_bytes": _BUILD_BYTES + ops * _BUILD_BYTES_PER_OP,
    }


def _kinds(gpus: int) -> tuple[Kind, ...]:
    return ("one GPU",) if gpus == 1 else _SPLITS


def _described(placement: Placement, gpu: GpuSpec) -> dict[str, Any]:
    return {
        "kind": placement.kind,
        "gpu": gpu.name,
        "gpus": len(placement.gpus),
        "fits": placement.fits(gpu),
        "bytes_per_gpu": [{**asdict(part), "total": part.total} for part in placement.gpus],
        "host_bytes": placement.host,
        "host_bytes_per_token": placement.crossing,
        "short": max(0, placement.largest.total - gpu.memory),
    }


def asked(placer: Placer, request: Request) -> list[Placement]:
    """Return the splits over the number of GPUs that was asked for."""
    return [placer.split(kind, request.gpus) for kind in _kinds(request.gpus)]


def _nearest(placer: Placer, request: Request) -> Iterator[tuple[Placement, GpuSpec]]:
    """Yield what would do: more of the same GPU, its host's memory, one other GPU, or many large ones."""
    same = [(found, request.gpu) for kind in _SPLITS if (found := placer.fewest(kind, request.gpu))]
    yield from same
    host = placer.host_experts()
    if host.fits(request.gpu) and not request.gpu.shares_memory:
        yield host, request.gpu
    one, by_memory = placer.one(), sorted(known().values(), key=lambda gpu: gpu.memory)
    single = next((gpu for gpu in by_memory if one.fits(gpu)), None)
    if single is not None:
        yield one, single
    elif not same:
        yield from (
            (found, by_memory[-1]) for kind in _SPLITS if (found := placer.fewest(kind, by_memory[-1]))
        )


def _fits(config: ModelConfig, stored: WeightFormat, request: Request, load: Load) -> bool:
    placer = Placer(config, stored, load)
    return any(split.fits(request.gpu) for split in asked(placer, request))


def _longest(config: ModelConfig, stored: WeightFormat, request: Request) -> int:
    most = config.max_position_embeddings

    def fits(context: int) -> bool:
        return _fits(config, stored, request, replace(request.load, context=context))

    return largest(min(CAPACITY_STEP, most), most, fits, step=min(CAPACITY_STEP, most))


def _most_slots(config: ModelConfig, stored: WeightFormat, request: Request) -> int:
    return largest(
        1,
        MOST_BATCH,
        lambda batch: _fits(config, stored, request, replace(request.load, batch=batch)),
    )


def _estimates(
    config: ModelConfig, weights: int, request: Request, splits: list[tuple[Placement, GpuSpec]]
) -> dict[str, Any]:
    """Times of the splits that fit; `weights` are the bytes to load."""
    load, rows = request.load, []
    for split, on in splits:
        found = estimate(config, load, split, on, request.assume)
        bound = estimate(config, load, split, on, BOUND)
        disk, cached = load_seconds(weights, split, on, request.assume)
        row = {
            "kind": split.kind,
            "gpu": on.name,
            "gpus": len(split.gpus),
            **asdict(found),
            "bound_decode_seconds": bound.decode_seconds,
            "bound_tokens_per_second": bound.tokens_per_second,
            "load_seconds_from_disk": disk,
            "load_seconds_from_page_cache": cached,
        }
        if request.price is not None:
            hourly = request.price * len(split.gpus) / 3600 * 1e6
            row["usd_per_million_output"] = hourly / found.tokens_per_second
            row["usd_per_million_input"] = hourly / found.prefill_tokens_per_second
        rows.append(row)
    return {"assumptions": asdict(request.assume), "rows": rows, "api_prices": reference.API_PRICES}


def _against(config: ModelConfig, context: int) -> dict[str, Any]:
    return {
        "context": context,
        "v3_2": {
            "bytes_per_token": reference.BYTES_PER_TOKEN,
            "bytes": reference.BYTES_PER_TOKEN * context,
            "flops": reference.flops(context),
            "fp8_flops": reference.fp8_flops(context),
        },
        "flops": published_flops(config, context),
        "ratios": [{**asdict(ratio), "exists": ratio.cache.exists} for ratio in compare(config, context)],
    }
