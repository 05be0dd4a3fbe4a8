"""`v4graph doctor`: what this machine can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from v4graph.cli.output import json_option, print_json, size, table

if TYPE_CHECKING:
    from v4graph.doctor import Report


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine can do.

    Packages, GPUs and driver, the backends and targets that build and that run here, and each problem with
    its fix. Exit code 1 where nothing can be built or run.

    \b
    v4graph doctor
    v4graph doctor --json
    """
    from v4graph.doctor import examine

    report = examine()
    if as_json:
        print_json(dataclasses.asdict(report) | {"works": report.works})
    else:
        for line in _lines(report):
            click.echo(line)
    click.get_current_context().exit(0 if report.works else 1)


def _lines(report: Report) -> Iterator[str]:
    yield f"v4graph {report.v4graph}, Python {report.python}, {report.platform}"
    yield from ("", "packages:")
    yield from table([(p.name, p.version or "-", "" if p.version else p.fix) for p in report.packages], 2)
    yield from ("", "machine:")
    cards = [("GPU", f"{gpu.name}, {gpu.target}, {size(gpu.memory_bytes)}") for gpu in report.gpus]
    driver = f"runs CUDA {report.driver_cuda} at most" if report.driver_cuda else "none"
    yield from table([*(cards or [("GPU", "none")]), ("driver", driver), ("nvcc", report.nvcc or "none")], 2)
    yield from ("", "backends:")
    rows = [
        (b.name, b.version or "-", "builds" if b.builds else "-", "runs" if b.runs else "-", b.note)
        for b in report.backends
    ]
    yield from table(rows, 2)
    yield from _target_lines(report)
    if report.problems:
        yield from ("", "problems:")
        yield from (f"  {problem}" for problem in report.problems)


def _target_lines(report: Report) -> Iterator[str]:
    from v4graph.targets import ARCHITECTURES, PORTABLE

    titles = {PORTABLE: "Ampere and later"} | {name: a.title for name, a in ARCHITECTURES.items()}
    rows = [
        (
            target,
            title,
            f"built by {', '.join(builders)}",
            f"runs by {', '.join(runners)}" if runners else "-",
        )
        for target, title in titles.items()
        if (builders := [b.name for b in report.backends if target in b.build_targets])
        for runners in [[b.name for b in report.backends if target in b.run_targets]]
    ]
    if rows:
        yield from ("", "targets:")
        yield from table(rows, 2)
