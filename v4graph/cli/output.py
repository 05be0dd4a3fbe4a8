"""What the commands share: the --json option, aligned text, sizes, and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from v4graph.errors import EngineError

Progress = Callable[[str, int, int], None]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
allow_unknown_option = click.option(
    "--allow-unknown-config-keys",
    "allow_unknown",
    is_flag=True,
    help="Go on when config.json has unknown keys.",
)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps(value, indent=1))


def size(count: float) -> str:
    """Return bytes in decimal units with three digits: "864.7 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table(rows: Iterable[Sequence[str | int]], indent: int = 0) -> Iterator[str]:
    """Yield lines with aligned columns: text to the left, integers to the right with separators."""
    rows = list(rows)
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    for row, texts in zip(rows, cells, strict=True):
        aligned = (
            text.rjust(width) if isinstance(cell, int) else text.ljust(width)
            for cell, text, width in zip(row, texts, widths, strict=True)
        )
        yield (" " * indent + "  ".join(aligned)).rstrip()


@contextmanager
def progress() -> Iterator[Progress]:
    """Show stages on stderr: a bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _stage, _done, _total: None
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)

        def update(stage: str, done: int, total: int) -> None:
            shown.update(task, description=stage, completed=done, total=total)

        yield update


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the import of a tower: say which extra brings a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "v4graph").startswith("v4graph"):
            raise
        raise EngineError(
            f"this command needs the Python package '{error.name}'; "
            f"install it with `pip install 'v4graph[{name}]'`."
        ) from error
