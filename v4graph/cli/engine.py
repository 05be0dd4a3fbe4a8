"""`v4graph run` and `eval`: engine directory to text, and to bits per byte."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import allow_unknown_option, extra, json_option, print_json, progress, size
from v4graph.cli.sampling import generate_options, sampling_options

if TYPE_CHECKING:
    from v4graph.ort import Provider
    from v4graph_runtime import Score, Session, Stats, Tokenizer
    from v4graph_runtime.ort_backend import OrtOptions

checkpoint_option = click.option(
    "--checkpoint",
    metavar="DIR",
    help="Where the weights are: a directory or a Hub repository id. Not for an engine that embeds them.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=0), default=0, help="Threads per op; 0: one per core."
)
provider_option = click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where onnxruntime runs; cuda takes onnxruntime-gpu and an NVIDIA GPU.",
)


@click.command()
@click.argument("engine_dir", type=click.Path(path_type=Path))
@checkpoint_option
@click.option("--prompt", required=True, help="Text to go on from.")
@click.option("--max-new-tokens", type=int, default=128, show_default=True)
@sampling_options
@provider_option
@threads_option
@allow_unknown_option
@json_option
def run(
    engine_dir: Path,
    checkpoint: str | None,
    prompt: str,
    provider: Provider,
    threads: int,
    allow_unknown: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Generate text from a prompt.

    The text goes to stdout, the figures to stderr.

    \b
    v4graph run build/nano.engine --checkpoint models/nano --prompt "In the beginning" \\
        --max-new-tokens 200 --temperature 0.8 --min-p 0.05 --seed 1

    \b
    v4graph run build/nano.engine --checkpoint models/nano --prompt "Chapter " \\
        --regex "[1-9][0-9]?: [A-Z][a-z]+"
    """
    with extra("ort"):
        from v4graph_runtime import stream
    chosen = generate_options(options)
    session, tokenizer = open_engine(engine_dir, checkpoint, provider, threads, allow_unknown)
    pieces = stream(session, tokenizer, prompt, chosen)
    if as_json:
        text = "".join(pieces)
        print_json({"prompt": prompt, "text": text, "ids": pieces.ids, **_figures(pieces.stats)})
        return
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()
    click.echo(_summary(pieces.stats), err=True)


def _figures(stats: Stats) -> dict[str, Any]:
    return dataclasses.asdict(stats) | {"tokens_per_second": stats.tokens_per_second}


def _summary(stats: Stats) -> str:
    return (
        f"{stats.new_tokens} tokens ({stats.finish}), {stats.tokens_per_second:.1f} tokens/s; "
        f"first token after {stats.time_to_first_token * 1000:.0f} ms ({stats.prompt_tokens} in the prompt); "
        f"state {size(stats.state_bytes)}"
    )


@click.command("eval")
@click.argument("engine_dir", type=click.Path(path_type=Path))
@checkpoint_option
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    required=True,
    help="UTF-8 file that the model predicts.",
)
@click.option("--max-bytes", type=click.IntRange(min=1), help="Read only the beginning of the file.")
@click.option(
    "--documents", is_flag=True, help="Empty lines separate documents: score each from an empty state."
)
@click.option("--window", type=int, help="Tokens per window; default: the engine's capacity.")
@provider_option
@threads_option
@allow_unknown_option
@json_option
def evaluate(
    engine_dir: Path,
    checkpoint: str | None,
    text_file: Path,
    max_bytes: int | None,
    documents: bool,
    window: int | None,
    provider: Provider,
    threads: int,
    allow_unknown: bool,
    as_json: bool,
) -> None:
    """Score a text in bits per byte.

    Bits per byte do not depend on the tokenizer; less is better. Needs a graph exported with --all-logits.

    \b
    v4graph eval build/nano.engine --checkpoint models/nano --text models/nano/heldout.txt --documents
    """
    with extra("ort"):
        from v4graph_runtime import score
    text = _read(text_file, max_bytes)
    session, tokenizer = open_engine(engine_dir, checkpoint, provider, threads, allow_unknown)
    texts = [part + "\n" for part in text.rstrip("\n").split("\n\n")] if documents else [text]
    with progress() as report:
        scores = []
        for done, part in enumerate(texts):
            report("score", done, len(texts))
            scores.append(score(session, tokenizer, part, window))
    result = _sum(scores)
    if as_json:
        print_json(dataclasses.asdict(result) | {"bits_per_byte": result.bits_per_byte})
        return
    share = result.hits / result.tokens if result.tokens else 0.0
    click.echo(
        f"{result.bits_per_byte:.3f} bits per byte over {result.bytes:,} bytes of {text_file} "
        f"({result.tokens:,} tokens, {share:.1%} of them the most likely)"
    )


def _sum(scores: Iterable[Score]) -> Score:
    from v4graph_runtime import Score

    rows = [dataclasses.astuple(one) for one in scores]
    return Score(*(sum(column) for column in zip(*rows, strict=True)))


def _read(path: Path, max_bytes: int | None) -> str:
    try:
        data = path.read_bytes()
        if max_bytes is not None and max_bytes < len(data):
            # The cut may fall inside a character, which is then left out.
            return data[:max_bytes].decode("utf-8", errors="ignore")
        return data.decode("utf-8")
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}.", param_hint="--text") from error
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path}: not UTF-8 text ({error}).", param_hint="--text") from error


def open_engine(
    engine_dir: Path,
    checkpoint: str | None,
    provider: Provider,
    threads: int,
    allow_unknown: bool,
    batch: int = 1,
) -> tuple[Session, Tokenizer]:
    """Open an engine of `batch` slots with its weights, and the tokenizer beside either."""
    from v4graph.source import open_checkpoint
    from v4graph_runtime import Session, Tokenizer

    weights = open_checkpoint(checkpoint, allow_unknown=allow_unknown) if checkpoint is not None else None
    with progress() as report:
        report("open the engine", 0, 1)
        options = session_options(engine_dir, provider, threads)
        session = Session(engine_dir, weights, batch, options=options)
    return session, Tokenizer.load(engine_dir, weights.path if weights else None)


def session_options(engine_dir: Path, provider: Provider, threads: int) -> OrtOptions | None:
    """Return onnxruntime's options from the command line; None for an engine of another backend."""
    from v4graph.manifest import Manifest
    from v4graph_runtime.ort_backend import OrtOptions

    backend = Manifest.load(engine_dir, kind="engine").backend
    if backend == "ort":
        return OrtOptions(provider, threads)
    context = click.get_current_context()
    for name in ("provider", "threads"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name} is onnxruntime's, {engine_dir} is built with --backend {backend}; leave it out."
            )
    return None
