"""The text of `v4graph plan`: what is counted, then what is estimated, each said to be so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from v4graph.cli.output import size, table
from v4graph.planning.report import MOST_BATCH

Row = list[str | int]


def plan_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a report of `v4graph.planning.report`."""
    yield from _model(report)
    yield from _work(report)
    yield from _placement(report)
    yield from _estimates(report)
    yield from _against(report)


def _model(report: dict[str, Any]) -> Iterator[str]:
    model, checkpoint, state = report["model"], report["checkpoint"], report["state"]
    kinds = ", ".join(f"{n} {name}" for name, n in model["attention"].items())
    yield (
        f"{model['name']}: {model['layers']} layers ({kinds}), {model['experts']} experts, "
        f"{model['experts_per_token']} per token; {model['batch']} x {model['context']:,} tokens"
    )
    yield ""
    found = checkpoint["parameters"]
    yield (
        f"parameters: {_count(found['main'])}, {_count(found['active'])} of them per token"
        + (f"; multi-token prediction {_count(found['mtp'])} more" if found["mtp"] else "")
    )
    types = ", ".join(f"{name} {count:,}" for name, count in checkpoint["tensors_by_type"].items())
    yield f"checkpoint: {checkpoint['tensors']:,} tensors, {checkpoint['bytes']:,} bytes ({types})"
    if not checkpoint["stored"]["as_announced"]:
        yield "  (as `v4graph pack --quantize` would write it: this one is not quantised)"
    yield from table([(part, n, "bytes") for part, n in checkpoint["bytes_by_part"].items()], 2)
    resident = report["resident"]
    yield (
        f"resident in an engine: {size(resident['bytes'])}, {size(resident['experts'])} of it experts "
        f"({size(resident['one_expert'])} each)"
    )
    yield ""
    predicted = "" if model["caches_exist"] else " (predicted: no graph holds such caches yet)"
    yield (
        f"state, {model['kv_cache']} rows and {model['index_keys']} index keys{predicted}: "
        f"{state['bytes_per_token']:,.1f} bytes per token, {size(state['bytes_per_slot'])} per slot"
    )
    head: Row = ["kind", "layers", "bytes/token", "caches", "window", "tails", "one layer"]
    rows: list[Row] = [
        [
            k["kind"],
            k["layers"],
            f"{k['bytes_per_token']:g}",
            k["caches"],
            k["window"],
            k["tails"],
            k["bytes"],
        ]
        for k in state["kinds"]
    ]
    yield from table([head, *rows], 2)


def _count(parameters: int) -> str:
    """Return a number of parameters with four digits: 284.3B, 13.27B, 10.64M."""
    value, unit = (parameters / 1e9, "B") if parameters >= 1e9 else (parameters / 1e6, "M")
    return f"{value:,.{max(0, 4 - len(str(int(value))))}f}{unit}"


def _work(report: dict[str, Any]) -> Iterator[str]:
    decode, prefill, engine = report["decode"], report["prefill"], report["engine_estimate"]
    yield ""
    yield (
        f"one decoded token: {decode['total_flops'] / 1e9:.1f} GFLOP ({decode['fp8_flops'] / 1e9:.1f} in FP8 "
        f"equivalents), {size(decode['bytes'])} read, {decode['launches']} launches"
    )
    for reason in decode["refused_by_kernels"]:
        yield f"  no kernel for this model, so launches and workspace are lower bounds: {reason}"
    head: Row = ["GFLOP per token", *decode["flops"]]
    rows: list[Row] = [
        ["decode", *(f"{n / 1e9:.2f}" for n in decode["flops"].values())],
        ["prefill", *(f"{n / 1e9:.2f}" for n in prefill["flops_per_token"].values())],
    ]
    yield from table([head, *rows], 2)
    caches = ", ".join(f"{name} {size(n)}" for name, n in decode["cache_bytes"].items())
    yield f"  of the bytes, caches: {caches}"
    yield (
        f"  a prompt of {prefill['tokens']:,}: {prefill['total_flops'] / 1e15:.2f} PFLOP "
        f"({prefill['fp8_flops'] / 1e15:.2f} in FP8 equivalents) in "
        f"{prefill['calls']:,} calls of {prefill['chunk']:,} tokens"
    )
    yield (
        f"engine (estimate from measured builds): plan {size(engine['plan_bytes'])} with "
        f"{engine['plugin_layers']} plugin layers, built in {size(engine['build_bytes'])} of memory"
    )


def _placement(report: dict[str, Any]) -> Iterator[str]:
    found, gpu = report["placement"], report["placement"]["gpu"]
    yield ""
    yield (
        f"placement on {gpu['title']} ({gpu['memory_gb'] * 1e9:,.0f} bytes each; activations and "
        "1 GB of reserve are estimates; v4graph does not split engines yet):"
    )
    yield from table([_HEAD, *map(_split, found["asked"])], 2)
    if found["fits"]:
        batch, longest = found["largest_batch"], found["longest_context"]
        slots = f"{batch:,} slots or more" if batch == MOST_BATCH else f"up to {batch:,} slots"
        whole = " (all that the model takes)" if longest == report["model"]["max_context"] else ""
        yield f"  fits; {slots} at this context, or {longest:,} tokens{whole} in each of these slots"
        return
    least = min(found["asked"], key=lambda split: split["short"])
    part = max(least["bytes_per_gpu"], key=lambda part: part["total"])
    yield (
        f"  does not fit: {size(part['total'])} for {part['what']} and a GPU has {gpu['memory_gb']} GB, "
        f"{size(least['short'])} too little; the weights alone need {found['weights_alone_need']} of them"
    )
    if not found["nearest"]:
        yield "  no number of any known GPU does; a shorter --context or a smaller --batch may."
        return
    yield "  what does:"
    yield from table([_HEAD, *map(_split, found["nearest"])], 2)


_HEAD: Row = ["split", "GPUs", "fullest one", "weights", "states", "scratch", ""]


def _split(split: dict[str, Any]) -> Row:
    part = max(split["bytes_per_gpu"], key=lambda part: part["total"])
    scratch = part["workspace"] + part["activations"] + part["reserve"]
    note = ("" if split["fits"] else "too large ") + part["what"]
    if split["host_bytes"]:
        note += (
            f"; {size(split['host_bytes'])} in host memory, "
            f"{size(split['host_bytes_per_token'])} of it cross per token"
        )
    sizes = [size(n) for n in (part["total"], part["weights"], part["states"], scratch)]
    return [split["kind"], f"{split['gpus']} x {split['gpu']}", *sizes, note]


def _estimates(report: dict[str, Any]) -> Iterator[str]:
    found, batch = report["estimates"], report["model"]["batch"]
    assume = found["assumptions"]
    yield ""
    if not found["rows"]:
        yield "estimates: none, as nothing fits"
        return
    yield (
        f"estimates (op = max(bytes / {assume['bandwidth_share']:g} of the bandwidth, FLOPs / "
        f"{assume['compute_share']:g} of the bf16 rate), {assume['launch_us']:g} us per launch, "
        f"{assume['hop_us']:g} us per hop; not measured):"
    )
    head: Row = ["split", "GPUs", "decode", "tokens/s", "bound", "prompt", "tokens/s", "load, disk", "cached"]
    priced = any("usd_per_million_output" in row for row in found["rows"])
    rows: list[Row] = []
    for row in found["rows"]:
        rows.append(
            [
                row["kind"],
                f"{row['gpus']} x {row['gpu']}",
                f"{row['decode_seconds'] * 1e3:.2f} ms",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['bound_tokens_per_second']:,.0f}",
                f"{row['prefill_seconds']:,.1f} s",
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['load_seconds_from_disk']:.1f} s",
                f"{row['load_seconds_from_page_cache']:.1f} s",
            ]
        )
        if priced:
            rows[-1] += [f"{row['usd_per_million_input']:.2f}", f"{row['usd_per_million_output']:.2f}"]
    yield from table([head + (["USD/M in", "USD/M out"] if priced else []), *rows], 2)
    if batch > 1:
        yield f"  decode and tokens/s are of all {batch} slots; the prompt is one slot's"
    if priced:
        prices = ", ".join(
            f"{name} {low} in / {high} out" for name, (low, high) in found["api_prices"].items()
        )
        yield f"  published API prices in USD per million tokens: {prices}"


def _against(report: dict[str, Any]) -> Iterator[str]:
    found = report["against_v3_2"]
    base = found["v3_2"]
    yield ""
    yield (
        f"against DeepSeek-V3.2 at {found['context']:,} tokens ({base['bytes_per_token']:,} bytes per token, "
        f"{base['fp8_flops'] / 1e9:,.0f} GFLOP in FP8 equivalents per token):"
    )
    head: Row = ["rows", "index keys", "bytes/token", "cache", "of V3.2's", "FLOPs as FP8", "raw FLOPs", ""]
    rows: list[Row] = [
        [
            ratio["cache"]["kv"],
            ratio["cache"]["index"],
            f"{ratio['bytes_per_token']:,.1f}",
            size(ratio["bytes"]),
            f"{ratio['cache_ratio']:.2%}",
            f"{ratio['fp8_ratio']:.1%}",
            f"{ratio['flops_ratio']:.1%}",
            "" if ratio["exists"] else "predicted: not built yet",
        ]
        for ratio in found["ratios"]
    ]
    yield from table([head, *rows], 2)
