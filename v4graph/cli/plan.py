"""`v4graph plan`: what a model needs, where it fits and how fast it can be, before anything is downloaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click

from v4graph.cli.output import allow_unknown_option, extra, json_option, print_json, size, table
from v4graph.planning.cache import IndexType, KvType

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20}
Row = list[str | int]


class Tokens(click.ParamType[int]):
    """A number of tokens: 8192, 128K (times 1,024) or 1M (times 1,048,576)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of tokens."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"([\d_,]+)([kKmM]?)", value)
        if found is None:
            self.fail(f"{value!r} is not a number of tokens; give one like 8192, 128K or 1M.", param, ctx)
        return int(re.sub("[_,]", "", found[1])) * _UNITS[found[2].lower()]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--context", type=Tokens(), default="1M", show_default=True, help="Tokens in each slot.")
@click.option("--batch", default=1, show_default=True, help="Slots.")
@click.option(
    "--kv-cache",
    type=click.Choice(get_args(KvType)),
    default="bf16",
    show_default=True,
    help="Rows of the window and compressed caches; fp8: packed, 584 bytes, which no graph holds yet.",
)
@click.option(
    "--index-keys",
    type=click.Choice(get_args(IndexType)),
    help="Keys of the indexer.  [default: fp4 with --kv-cache fp8, else as --kv-cache]",
)
@click.option(
    "--gpu",
    default="h200",
    show_default=True,
    help="h100-80g, h200, b200, rtx5090, ..., or a .toml file of one's figures; --list-gpus shows all.",
)
@click.option(
    "--gpus", default=1, show_default=True, help="How many of them; a plan that does not fit exits 1."
)
@click.option(
    "--price", type=float, metavar="USD", help="Price of one GPU hour: adds USD per million tokens."
)
@click.option("--launch-us", default=3.7, show_default=True, help="Assumed cost of one kernel launch.")
@click.option("--bandwidth-share", default=0.7, show_default=True, help="Assumed share of the bandwidth.")
@click.option("--compute-share", default=0.5, show_default=True, help="Assumed share of the bf16 rate.")
@click.option("--disk", default=5.0, show_default=True, help="Assumed read rate of the weights in GB/s.")
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page with pictures."
)
@click.option(
    "--list-gpus", is_flag=True, is_eager=True, expose_value=False, callback=lambda c, _p, v: _gpus(c, v),
    help="Print the known GPUs and stop.",
)  # fmt: skip
@allow_unknown_option
@json_option
def plan(
    model: str,
    context: int,
    batch: int,
    allow_unknown: bool,
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Show what a model needs and where it fits, from its config.json alone.

    MODEL is flash, pro, a config.json or a checkpoint. Bytes, FLOPs and launches are counted; whatever is an
    estimate says so, with the assumptions that it rests on. Takes no GPU and reads no weights.

    \b
    v4graph plan flash --gpu h200 --gpus 2
    v4graph plan pro --context 128K --batch 32 --gpu b200 --gpus 8 --price 6
    v4graph plan flash --kv-cache fp8 --html plan.html
    """
    from v4graph.planning.report import make_report
    from v4graph.source import resolve

    source = resolve(model, allow_unknown=allow_unknown)
    weights = source.checkpoint.weights if source.checkpoint else source.config.weight_format
    report = make_report(source.name, source.config, weights, _request(context, batch, **options))
    if html is not None:
        with extra("plan"):
            from v4graph.planning.page import write_page
        write_page(report, source.config, html)
    if as_json:
        print_json(report)
    else:
        for line in _lines(report):
            click.echo(line)
        if html is not None:
            click.echo(f"\n{html}: the same with pictures")
    if not report["placement"]["fits"] and _given("gpus"):
        click.get_current_context().exit(1)


def _request(
    context: int,
    batch: int,
    kv_cache: KvType,
    index_keys: IndexType | None,
    gpu: str,
    gpus: int,
    price: float | None,
    launch_us: float,
    bandwidth_share: float,
    compute_share: float,
    disk: float,
) -> Any:
    """Return the `Request` of the options. As many parameters as the command has options for it."""
    from v4graph.planning.cache import CacheFormat
    from v4graph.planning.estimate import Assumptions
    from v4graph.planning.hardware import find
    from v4graph.planning.placement import Load
    from v4graph.planning.report import Request

    if gpus < 1:
        raise click.BadParameter(f"{gpus} GPUs hold nothing; give 1 or more.", param_hint="--gpus")
    for name, share in (("--bandwidth-share", bandwidth_share), ("--compute-share", compute_share)):
        if not 0 < share <= 1:
            raise click.BadParameter(f"{share} is no share; give one above 0, up to 1.", param_hint=name)
    if launch_us < 0 or disk <= 0 or (price is not None and price < 0):
        raise click.UsageError("--launch-us and --price must not be negative, and --disk must be above 0.")
    chosen: IndexType = index_keys or ("fp4" if kv_cache == "fp8" else kv_cache)
    assume = Assumptions(launch_us, bandwidth_share, compute_share, disk_gb_s=disk)
    return Request(Load(batch, context, CacheFormat(kv_cache, chosen)), find(gpu), gpus, price, assume)


def _given(option: str) -> bool:
    source = click.get_current_context().get_parameter_source(option)
    return source is click.core.ParameterSource.COMMANDLINE


def _gpus(ctx: click.Context, wanted: bool) -> None:
    if not wanted:
        return
    from v4graph.planning.hardware import known

    head = ["name", "GPU", "target", "memory", "bandwidth", "bf16 TFLOP/s", "fp8", "fp4"]
    rows = [
        [gpu.name, gpu.title, gpu.target, f"{gpu.memory_gb} GB", f"{gpu.bandwidth_gb_s} GB/s"]
        + [f"{rate or '-'}" for rate in (gpu.bf16_tflops, gpu.fp8_tflops, gpu.fp4_tflops)]
        for gpu in known().values()
    ]
    for line in table([head, *rows]):
        click.echo(line)
    ctx.exit()


def _lines(report: dict[str, Any]) -> Iterator[str]:
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
        f"parameters: {found['main'] / 1e9:,.1f}B, {found['active'] / 1e9:.2f}B of them per token; "
        f"multi-token prediction {found['mtp'] / 1e9:.1f}B more"
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


def _work(report: dict[str, Any]) -> Iterator[str]:
    decode, prefill, engine = report["decode"], report["prefill"], report["engine_estimate"]
    yield ""
    yield (
        f"one decoded token: {decode['total_flops'] / 1e9:.1f} GFLOP ({decode['fp8_flops'] / 1e9:.1f} in FP8 "
        f"equivalents), {size(decode['bytes'])} read, {decode['launches']} launches"
    )
    head: Row = ["GFLOP per token", *decode["flops"]]
    rows: list[Row] = [
        ["decode", *(f"{n / 1e9:.2f}" for n in decode["flops"].values())],
        ["prefill", *(f"{n / 1e9:.2f}" for n in prefill["flops_per_token"].values())],
    ]
    yield from table([head, *rows], 2)
    caches = ", ".join(f"{name} {size(n)}" for name, n in decode["cache_bytes"].items())
    yield f"  of the bytes, caches: {caches}"
    yield (
        f"  a prompt of {prefill['tokens']:,}: {prefill['total_flops'] / 1e15:.2f} PFLOP in "
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
        yield (
            f"  fits; up to {found['largest_batch']:,} slots at this context, or "
            f"{found['longest_context']:,} tokens in each of these slots"
        )
        return
    least = min(found["asked"], key=lambda split: split["short"])
    part = max(least["bytes_per_gpu"], key=lambda part: part["total"])
    yield (
        f"  does not fit: {size(part['total'])} for {part['what']} and a GPU has {gpu['memory_gb']} GB, "
        f"{size(least['short'])} too little; the weights alone need {found['weights_alone_need']} of them"
    )
    if not found["nearest"]:
        yield "  nothing near does either; a shorter --context or a smaller --batch may."
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
