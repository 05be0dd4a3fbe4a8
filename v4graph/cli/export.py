"""`v4graph export`: checkpoint or config to graph directory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import allow_unknown_option, extra, json_option, print_json, progress, size

if TYPE_CHECKING:
    from v4graph.manifest import FloatType
    from v4graph.source import Source

DTYPES: Mapping[str, FloatType] = {"fp32": "float32", "bf16": "bfloat16"}


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("graph_dir", type=click.Path(path_type=Path))
@click.option(
    "--numerics",
    type=click.Choice(["exact", "v4"]),
    default="v4",
    show_default=True,
    help="exact: nothing quantised, to compare with other implementations; v4: the official quantisation.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    default="fp32",
    show_default=True,
    help="fp32 runs in onnxruntime on a CPU; bf16 is for TensorRT.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    default=8192,
    show_default=True,
    help="Tokens that a session can hold; rounded up to a multiple of 128 and of the compress ratios.",
)
@click.option(
    "--rollback-slack",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Tokens that a session can take back.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Keep only the first N layers.")
@click.option("--all-logits", is_flag=True, help="Logits of every position, not only of each slot's last.")
@click.option("--embed-weights", is_flag=True, help="Write a graph that any ONNX runtime runs by itself.")
@click.option(
    "--no-optimize",
    "optimize",
    flag_value=False,
    type=bool,
    default=True,
    help="Leave the graph as traced; run passes with `v4graph optimize`.",
)
@click.option("--dry-run", is_flag=True, help="Check everything that can be checked, and write nothing.")
@allow_unknown_option
@json_option
def export(
    source: str,
    graph_dir: Path,
    dtype: str,
    dry_run: bool,
    allow_unknown: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn a model into an ONNX graph.

    Writes model.onnx and manifest.json to GRAPH_DIR; the weights stay in the checkpoint.
    SRC is a checkpoint directory, a Hub repository id, a config.json, or a preset (flash, pro, nano).
    Of a Hub repository only config and tokenizer are fetched, unless --embed-weights needs the rest.

    \b
    v4graph export models/nano build/nano.graph
    v4graph export flash build/flash.graph --numerics v4 --dtype bf16
    v4graph export deepseek-ai/DeepSeek-V4-Flash build/flash.graph --dtype bf16 --max-seq-len 65536
    """
    from v4graph.source import resolve

    found = resolve(source, allow_unknown=allow_unknown, weights=options["embed_weights"])
    if dry_run:
        _dry_run(found, options["layers"], as_json)
        return
    with extra("export"):
        from v4graph_export import ExportOptions, export_graph
    started = time.perf_counter()
    with progress() as report:
        manifest = export_graph(found, graph_dir, ExportOptions(dtype=DTYPES[dtype], **options), report)
    result: dict[str, Any] = {
        "graph": str(graph_dir),
        "layers": {name: len(layers) for name, layers in manifest.layer_functions.items()},
        "max_seq_len": manifest.max_seq_len,
        "bytes": sum(path.stat().st_size for path in graph_dir.iterdir()),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if as_json:
        print_json(result)
        return
    kinds = ", ".join(f"{count} {name.removeprefix('V4Layer_')}" for name, count in result["layers"].items())
    click.echo(f"{graph_dir}: {kinds} layers, {size(result['bytes'])}, {result['seconds']:.1f} s")


def _dry_run(source: Source, layers: int | None, as_json: bool) -> None:
    config = source.config.shrink(layers=layers) if layers is not None else source.config
    if source.checkpoint is not None:
        source.checkpoint.check()
    kinds = Counter(layer.kind for layer in config.layers)
    weights = "checked" if source.checkpoint is not None else "bound later"
    if as_json:
        print_json({"source": source.name, "layers": dict(kinds), "weights": weights})
        return
    text = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    click.echo(f"{source.name}: {text} layers, weights {weights}; nothing written")
