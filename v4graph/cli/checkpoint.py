"""`v4graph init` and `v4graph pack`: write a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import click

from v4graph.cli.output import allow_unknown_option, json_option, print_json, progress, size


@click.command()
@click.argument("config", metavar="CONFIG")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Keep only the first N layers.")
@click.option("--experts", type=click.IntRange(min=1), help="Keep only the first N experts of each layer.")
@click.option("--unquantised", is_flag=True, help="Store every matrix as bf16 instead of FP8 and FP4.")
@allow_unknown_option
@json_option
def init(
    config: str,
    directory: Path,
    seed: int,
    layers: int | None,
    experts: int | None,
    unquantised: bool,
    allow_unknown: bool,
    as_json: bool,
) -> None:
    """Write a random checkpoint.

    It is in the official format: FP8 matrices, FP4 experts, unless --unquantised. CONFIG is a
    config.json, a directory that holds one, or a preset (flash, pro, nano).

    \b
    v4graph init nano build/random --seed 1
    v4graph init flash build/small-flash --layers 4 --experts 8
    """
    from v4graph.checkpoint.init import init as write
    from v4graph.config import UNQUANTISED, ModelConfig

    model = ModelConfig.load(config, allow_unknown=allow_unknown).shrink(layers, experts)
    with progress() as report:
        write(
            model,
            directory,
            seed,
            weights=UNQUANTISED if unquantised else None,
            progress=lambda done, total: report("write", done, total),
        )
    _summary(directory, as_json)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("directory", metavar="DST", type=click.Path(path_type=Path))
@click.option("--quantize", is_flag=True, help="Store a bf16 or fp32 model as FP8 matrices and FP4 experts.")
@json_option
def pack(source: str, directory: Path, quantize: bool, as_json: bool) -> None:
    """Repack or quantise a checkpoint.

    DST holds the experts of each layer stacked, as graphs read them, so that opening it copies no
    weight. With --quantize it holds SRC in the official FP8 and FP4 form, which v4 numerics need.

    \b
    v4graph pack models/nano build/nano.packed
    v4graph pack my-finetune build/my-finetune.fp8 --quantize
    """
    from v4graph.checkpoint.pack import pack as write
    from v4graph.source import open_checkpoint

    with progress() as report:
        write(
            open_checkpoint(source).path,
            directory,
            quantise=quantize,
            progress=lambda done, total: report("write", done, total),
        )
    _summary(directory, as_json)


def _summary(directory: Path, as_json: bool) -> None:
    from v4graph.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(directory, allow_unknown_config_keys=True)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    layers = len(checkpoint.config.layers)
    if as_json:
        print_json(
            {"checkpoint": str(directory), "layers": layers, "packed": checkpoint.packed, "bytes": total}
        )
        return
    click.echo(f"{directory}: {layers} layers, {size(total)}{', packed' if checkpoint.packed else ''}")
