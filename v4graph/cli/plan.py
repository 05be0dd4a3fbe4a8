"""`v4graph plan`: what a model needs, where it fits and how fast it can be, before anything is downloaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import click

from v4graph.cli.output import allow_unknown_option, extra, json_option, print_json, table
from v4graph.cli.plan_text import plan_lines
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
        for line in plan_lines(report):
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
