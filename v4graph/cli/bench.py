"""`v4graph bench`: times of an engine, beside its function bodies or transformers."""

from __future__ import annotations

import csv
import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.engine import checkpoint_option, provider_option, session_options, threads_option
from v4graph.cli.output import allow_unknown_option, extra, json_option, print_json, progress, size, table

if TYPE_CHECKING:
    from v4graph.ort import Provider
    from v4graph_runtime.bench import Load, Timed

_COLUMNS = [
    "date",
    "engine",
    "side",
    "batch",
    "prompt",
    "context",
    "tokens",
    "rounds",
    "threads",
    "prefill_s",
    "decode_s",
]


@click.command()
@click.argument("engine_dir", type=click.Path(path_type=Path))
@checkpoint_option
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Slots.")
@click.option(
    "--prompt", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of the prefill."
)
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="Tokens in the state before decoding.",
)
@click.option(
    "--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens decoded per round."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Rounds that count, after one that does not.",
)
@click.option(
    "--against",
    type=click.Choice(["bodies", "transformers"]),
    multiple=True,
    help="Time this too, round by round in turn: onnxruntime without the CPU kernels, or the checkpoint in "
    "transformers (eager, float32).",
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Append the rows to this file.")
@provider_option
@threads_option
@allow_unknown_option
@json_option
def bench(
    engine_dir: Path,
    checkpoint: str | None,
    against: tuple[str, ...],
    csv_file: Path | None,
    provider: Provider,
    threads: int,
    allow_unknown: bool,
    as_json: bool,
    **load: int,
) -> None:
    """Time prefill and decode of an engine: medians, tokens per second, weights read per second.

    \b
    v4graph bench build/nano.engine --checkpoint models/nano
    v4graph bench build/nano.engine --checkpoint models/nano --against bodies --threads 2 --json
    v4graph bench build/tiny.engine --checkpoint tiny --against transformers --csv benchmarks/bench.csv
    """
    with extra("ort"):
        from v4graph_runtime import Session
        from v4graph_runtime.bench import (
            Load,
            check_load,
            measure,
            peak_memory,
            read_rate,
            session_side,
            weight_bytes_per_token,
        )
        from v4graph_runtime.ort_backend import OrtOptions, available_cores
    from v4graph.source import open_checkpoint

    wanted = Load(**load)
    weights = open_checkpoint(checkpoint, allow_unknown=allow_unknown) if checkpoint is not None else None
    options = session_options(engine_dir, provider, threads)
    with progress() as report:
        report("open the engine", 0, 1)
        session = Session(engine_dir, weights, batch=wanted.batch, options=options)
        check_load(session, wanted)
        sides = [session_side("engine", session)]
        for name in against:
            if name == "bodies":
                if not isinstance(options, OrtOptions) or provider != "cpu":
                    raise click.UsageError("--against bodies is for an onnxruntime engine on the CPU.")
                plain = dataclasses.replace(options, kernels=False)
                sides.append(
                    session_side("bodies", Session(engine_dir, weights, batch=wanted.batch, options=plain))
                )
            else:
                if weights is None:
                    raise click.UsageError("--against transformers needs --checkpoint.")
                from v4graph.verify.sides import transformers_side

                sides.append(transformers_side(weights.path, threads or available_cores()))
        timed = measure(sides, wanted, session.vocab_size, report)
        peak = peak_memory()
        rate = read_rate(threads or available_cores()) if provider == "cpu" else None
    experts = weights.config.num_experts_per_tok if weights is not None else 0
    read = weight_bytes_per_token(session.manifest, experts) if weights is not None else None
    result: dict[str, Any] = {
        "engine": str(engine_dir),
        **dataclasses.asdict(wanted),
        "threads": threads or available_cores(),
        "peak_rss_bytes": peak,
        "state_bytes": session.state_bytes,
        "weight_bytes_per_token": read,
        "read_bytes_per_second": rate,
        "sides": [
            _figures(side.name, one, timed[0], wanted, read if side.name != "transformers" else None)
            for side, one in zip(sides, timed, strict=True)
        ],
    }
    if csv_file:
        _append(csv_file, result)
    if as_json:
        print_json(result)
    else:
        _show(result)


def _figures(name: str, one: Timed, engine: Timed, load: Load, read: int | None) -> dict[str, Any]:
    return {
        "side": name,
        "prefill_seconds": one.prefill,
        "prefill_tokens_per_second": load.batch * load.prompt / one.prefill,
        "decode_seconds": one.decode,
        "decode_tokens_per_second": load.batch / one.decode,
        # Of one slot: the experts of several slots overlap by chance.
        "weight_bytes_per_second": read / one.decode if read and load.batch == 1 else None,
        "engine_is_faster": {"prefill": one.prefill / engine.prefill, "decode": one.decode / engine.decode},
    }


def _show(result: dict[str, Any]) -> None:
    rows = [("", "prefill", "tokens/s", "per token", "tokens/s", "weights", "engine is faster by")]
    for side in result["sides"]:
        read = side["weight_bytes_per_second"]
        ratio = side["engine_is_faster"]
        rows.append(
            (
                side["side"],
                f"{side['prefill_seconds'] * 1e3:.1f} ms",
                f"{side['prefill_tokens_per_second']:.0f}",
                f"{side['decode_seconds'] * 1e3:.2f} ms",
                f"{side['decode_tokens_per_second']:.1f}",
                f"{read / 1e9:.1f} GB/s" if read else "",
                "" if side["side"] == "engine" else f"{ratio['prefill']:.2f} x, {ratio['decode']:.2f} x",
            )
        )
    for line in table(rows):
        click.echo(line)
    rate = result["read_bytes_per_second"]
    click.echo(
        f"\nbatch {result['batch']}, prompt {result['prompt']} (its prefill is the time to the first token), "
        f"decode after {result['context']} tokens, {result['threads']} threads, medians of "
        f"{result['rounds']} rounds"
    )
    if result["weight_bytes_per_token"]:
        beside = f", this machine reads {rate / 1e9:.1f} GB/s" if rate else ""
        click.echo(f"weights per token: {size(result['weight_bytes_per_token'])}{beside}")
    click.echo(f"peak memory {size(result['peak_rss_bytes'])}, state {size(result['state_bytes'])}")


def _append(path: Path, result: dict[str, Any]) -> None:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(_COLUMNS)
        for side in result["sides"]:
            shared = [result[key] for key in ["batch", "prompt", "context", "tokens", "rounds", "threads"]]
            times = [f"{side[key]:.6f}" for key in ("prefill_seconds", "decode_seconds")]
            writer.writerow([today, Path(result["engine"]).name, side["side"], *shared, *times])
