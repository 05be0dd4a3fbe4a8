"""`v4graph build`: graph directory to engine directory, for onnxruntime or TensorRT."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from v4graph.cli.output import extra, json_option, print_json, progress, size, table
from v4graph.errors import EngineError
from v4graph.ops import OPS_BY_NAME

if TYPE_CHECKING:
    from v4graph.ort import Provider
    from v4graph.trt import Choice
    from v4graph_plugins.build import BuildOptions, Built

FILE = click.Path(path_type=Path, dir_okay=False)
_TRT_ONLY = (
    "targets", "without_plugin", "max_batch_size", "max_input_len", "max_seq_len", "optimization_level",
    "timing_cache", "weight_streaming", "lowered", "print_trtexec", "dry_run",
)  # fmt: skip


@click.command()
@click.argument("graph_dir", type=click.Path(path_type=Path))
@click.argument("engine_dir", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    type=click.Choice(["ort", "trt"]),
    default="ort",
    show_default=True,
    help="ort: onnxruntime; trt: TensorRT, full or for RTX.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="SM",
    help="GPU to build for: sm80, sm86, sm89, sm120, ..., or portable (Ampere and later). May repeat. "
    "Default: portable with TensorRT for RTX, the GPU in the machine with full TensorRT.",
)
@click.option(
    "--tensorrt",
    type=click.Choice(["auto", "full", "rtx"]),
    default="auto",
    show_default=True,
    help="Which TensorRT; auto: full where it is installed and there is a GPU, else for RTX.",
)
@click.option("--max-batch-size", type=int, default=8, show_default=True, help="Most slots of one session.")
@click.option(
    "--max-input-len", type=int, help="Most tokens per slot in one call.  [default: 2048 or the capacity]"
)
@click.option("--max-seq-len", type=int, default=0, help="Capacity in tokens.  [default: the graph's]")
@click.option(
    "--no-plugin",
    "without_plugin",
    multiple=True,
    metavar="OP",
    help="Run this op as its function body, in native layers. Repeat for several.",
)
@click.option(
    "--builder-optimization-level",
    "optimization_level",
    type=click.IntRange(0, 5),
    help="TensorRT's: 0 builds fast, 5 searches longest.",
)
@click.option(
    "--timing-cache", type=FILE, help="File of measured tactics to read and update; full TensorRT only."
)
@click.option("--weight-streaming", is_flag=True, help="Let embedded weights stream from the host.")
@click.option("--lowered", type=FILE, help="Also write the ONNX graph that TensorRT is given.")
@click.option("--print-trtexec", is_flag=True, help="Print the equivalent trtexec line and build nothing.")
@click.option("--dry-run", is_flag=True, help="Check and parse everything, build nothing.")
@click.option("--verbose", is_flag=True, help="Show TensorRT's own log on stderr.")
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="onnxruntime's: check that the graph loads there.",
)
@json_option
def build(
    graph_dir: Path,
    engine_dir: Path,
    backend: str,
    provider: Provider,
    as_json: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Build an engine from a graph.

    ENGINE_DIR is complete but for the weights, which a session binds; GRAPH_DIR may go.

    \b
    v4graph build build/nano.graph build/nano.engine --backend ort
    v4graph build build/flash.graph build/flash.engine --backend trt --target sm120
    v4graph build build/flash.graph build/flash.engine --backend trt --target sm89 --target sm120
    """
    if backend == "ort":
        _refuse_trt_options()
        _build_ort(graph_dir, engine_dir, provider, as_json)
        return
    if given("provider"):
        raise click.UsageError("--provider is onnxruntime's; add --backend ort or leave it out.")
    with extra("rtx"):
        from v4graph_plugins.build import build_engine
    if verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(message)s")
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("v4graph_plugins").setLevel(logging.DEBUG)
    settings = _settings(graph_dir, options)
    if options["print_trtexec"]:
        click.echo(_trtexec(graph_dir, engine_dir, settings))
        return
    started = time.perf_counter()
    with progress() as report:
        built = build_engine(graph_dir, engine_dir, settings, report)
    _report(engine_dir, built, round(time.perf_counter() - started, 2), as_json, dry_run=settings.dry_run)


def _refuse_trt_options() -> None:
    for name in _TRT_ONLY:
        if given(name):
            command = click.get_current_context().command
            option = next(p.opts[0] for p in command.params if p.name == name)
            raise click.UsageError(f"{option} is TensorRT's; add --backend trt or leave it out.")


def given(name: str) -> bool:
    """Return whether the option was given on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def _build_ort(graph_dir: Path, engine_dir: Path, provider: Provider, as_json: bool) -> None:
    with extra("ort"):
        from v4graph_runtime import build_engine
        from v4graph_runtime.ort_backend import OrtOptions
    started = time.perf_counter()
    with progress() as report:
        report("check that onnxruntime loads the graph", 0, 1)
        manifest = build_engine(graph_dir, engine_dir, options=OrtOptions(provider=provider))
    seconds = round(time.perf_counter() - started, 2)
    if as_json:
        print_json({"engine": str(engine_dir), "backend": "ort", "tools": manifest.tools, "seconds": seconds})
        return
    layers = sum(len(indices) for indices in manifest.layer_functions.values())
    click.echo(f"{engine_dir}: ort engine, {layers} layers, {seconds} s")


def _settings(graph_dir: Path, options: dict[str, Any]) -> BuildOptions:
    from v4graph.manifest import Manifest
    from v4graph_plugins.build import BuildOptions
    from v4graph_plugins.plan import PlanOptions
    from v4graph_plugins.profiles import Limits

    seq_len = options["max_seq_len"]
    input_len = options["max_input_len"]
    if input_len is None:
        input_len = min(2048, seq_len or Manifest.load(graph_dir, kind="graph").max_seq_len)
    return BuildOptions(
        targets=options["targets"],
        tensorrt=cast("Choice", options["tensorrt"]),
        limits=Limits(options["max_batch_size"], input_len, seq_len),
        plan=PlanOptions(options["optimization_level"], options["timing_cache"], options["weight_streaming"]),
        without_plugin=options["without_plugin"],
        lowered=options["lowered"],
        dry_run=options["dry_run"],
    )


def _trtexec(graph_dir: Path, engine_dir: Path, settings: BuildOptions) -> str:
    from v4graph.manifest import Manifest
    from v4graph.trt import load
    from v4graph_plugins.build import PLAN, choose_targets
    from v4graph_plugins.profiles import profiles
    from v4graph_plugins.trtexec import trtexec_line

    manifest, tensorrt = Manifest.load(graph_dir, kind="graph"), load(settings.tensorrt)
    targets = choose_targets(tensorrt, settings.targets)
    onnx = settings.lowered or graph_dir / "lowered.onnx"
    shapes = profiles(manifest, settings.limits)
    return trtexec_line(manifest, onnx, engine_dir / PLAN, targets, shapes, settings, rtx=tensorrt.rtx)


def _report(engine_dir: Path, built: Built, seconds: float, as_json: bool, *, dry_run: bool) -> None:
    record = built.manifest.tensorrt
    if record is None:
        raise EngineError(f"{engine_dir}: no TensorRT record; build it again.")
    if as_json:
        print_json(
            {
                "engine": None if dry_run else str(engine_dir),
                "backend": "trt",
                "tensorrt": {
                    "package": record.package,
                    "version": record.version,
                    "why": built.tensorrt.reason,
                },
                "targets": list(record.targets),
                "plan_bytes": built.plan_bytes,
                "plugin_layers": built.plugin_layers,
                "bodies": list(record.bodies),
                "tools": built.manifest.tools,
                "seconds": seconds,
            }
        )
        return
    layers = sum(len(indices) for indices in built.manifest.layer_functions.values())
    click.echo(f"with {built.tensorrt}")
    what = "checked and parsed, nothing built" if dry_run else f"plan {size(built.plan_bytes)}"
    click.echo(
        f"{engine_dir}: trt engine for {', '.join(record.targets)}, {layers} layers, "
        f"{built.plugin_layers} plugin layers, {what}, {seconds} s"
    )
    for line in table(
        [(p.name, *(f"{k} {v[0]}..{v[2]}" for k, v in _bounds(p))) for p in record.profiles], 2
    ):
        click.echo(line)
    if given("timing_cache") and built.tensorrt.rtx:
        click.echo("  note: TensorRT for RTX keeps no timing cache; --timing-cache has no effect")
    if record.bodies:
        click.echo(f"  without plugin, as native layers: {', '.join(record.bodies)}")
    copying = [name for name in record.bodies if any(port.alias for port in OPS_BY_NAME[name].outputs)]
    if copying:
        click.echo(
            f"  note: the body of {', '.join(copying)} copies its states, so sessions refuse this engine"
        )


def _bounds(profile: Any) -> list[tuple[str, tuple[int, int, int]]]:
    return [("batch", profile.batch), ("tokens", profile.tokens), ("capacity", profile.capacity)]
