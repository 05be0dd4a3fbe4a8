"""`v4graph view`: a graph or engine directory to a page of HTML, or to the page's data as JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import extra, json_option, print_json, size
from v4graph.errors import ManifestError

if TYPE_CHECKING:
    from v4graph.viewer import Subject

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
_LONGEST = 16 << 20


class Tokens(click.ParamType[int]):
    """A number of tokens: 4096, 128K or 1M, where K is 1024."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the text of an option."""
        found = re.fullmatch(r"(\d{1,9})([KM]?)", str(value).upper())
        tokens = int(found[1]) * _UNITS[found[2]] if found else -1
        if not 0 <= tokens <= _LONGEST:
            self.fail(
                f"'{value}' is not a number of tokens, such as 4096, 128K or 1M (at most 16M).", param, ctx
            )
        return tokens


@click.command()
@click.argument("path", metavar="PATH", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path, dir_okay=False), help="HTML file to write."
)
@click.option("--against", metavar="PATH2", type=click.Path(path_type=Path), help="Show what PATH2 changes.")
@click.option("--context", type=Tokens(), default="128K", show_default=True, help="Tokens before the step.")
@click.option(
    "--batch", type=click.IntRange(1, 4096), default=1, show_default=True, help="Slots of the step."
)
@click.option(
    "--tokens", type=click.IntRange(1, 65536), default=1, show_default=True, help="New tokens of each slot."
)
@json_option
def view(
    path: Path, out: Path | None, against: Path | None, context: int, as_json: bool, **step: int
) -> None:
    """Write a page of HTML that shows a graph.

    Layers by kind with their ops, shapes, bytes, FLOPs and kernel launches, the states, and a chart of bytes
    and FLOPs by layer at contexts up to 1M tokens. With --against, also the ops of PATH beside those of
    PATH2. PATH is a graph or engine directory; the page is one file and needs no network.

    \b
    v4graph view build/flash.graph -o flash.html
    v4graph view build/flash.raw -o diff.html --against build/flash.graph
    """
    if out is None and not as_json:
        raise click.UsageError("say where the page goes with -o FILE, or print its data with --json.")
    paths = [path] if against is None else [path, against]
    with extra("export"):
        from v4graph.viewer import compare, describe, render, write
    subjects = [_open(folder) for folder in paths]
    if against is not None:
        for subject in subjects:
            if subject.model is None:
                raise ManifestError(
                    f"{subject.path}: a TensorRT plan has no graph to compare; give the graph directory that "
                    "it was built from."
                )
    report = describe(subjects, context=context, **step)
    report["diff"] = compare(*report["graphs"]) if against is not None else None
    if out is not None:
        write(render(report), out)
    if as_json:
        print_json(report)
    elif out is not None:
        click.echo(
            f"{out}: {', '.join(_line(graph) for graph in report['graphs'])}, {size(out.stat().st_size)}"
        )


def _open(folder: Path) -> Subject:
    """Read a graph or engine directory.

    Raises:
        ManifestError: neither of the two, or its model.onnx cannot be read.
    """
    import onnx_ir as ir

    from v4graph.manifest import Manifest
    from v4graph.viewer import Subject

    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ManifestError(f"{folder}: {what}, expected a graph or engine directory; see `v4graph export`.")
    manifest = Manifest.load(folder)
    if manifest.tensorrt is not None:
        return Subject(folder, manifest, None)
    try:
        return Subject(folder, manifest, ir.load(folder / "model.onnx"))
    except Exception as error:  # protobuf and onnx_ir raise errors without a common base
        raise ManifestError(
            f"{folder / 'model.onnx'}: not an ONNX model ({' '.join(str(error).split()).rstrip('.')}); "
            "export or build it again."
        ) from error


def _line(graph: dict[str, Any]) -> str:
    if not graph["opened"]:
        return f"{graph['model']} (a TensorRT plan: no graph to open)"
    return f"{graph['model']} ({len(graph['layers'])} parts, {len(graph['blocks'])} distinct)"
