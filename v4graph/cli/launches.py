"""`v4graph inspect --launches`: what one decoded token launches, reads and computes, by kind of layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import extra, print_json, size, table
from v4graph.errors import EngineError

if TYPE_CHECKING:
    from v4graph.passes.measure import Block


def show_launches(folder: Path, context: int, as_json: bool) -> None:
    """Print the table of a graph directory, or of an engine directory that has the graph in it."""
    with extra("export"):
        import onnx_ir as ir

        from v4graph.manifest import Manifest
        from v4graph.passes.measure import Step, measure

    manifest = Manifest.load(folder)
    path = folder / "model.onnx"
    if not path.is_file():
        raise EngineError(
            f"{folder}: a TensorRT engine holds no graph; give the graph directory that it was built from."
        )
    capacity = max(manifest.max_seq_len, -(-(context + 1) // 128) * 128)
    blocks = measure(ir.load(path), Step(context=context, capacity=capacity))
    report = _report(blocks, context)
    if as_json:
        print_json(report)
        return
    header = ["kind", "layers", "nodes", "custom ops", "launches", "bytes", "MFLOP"]
    rows: list[list[str | int]] = [list(header)]
    for kind in (*report["kinds"], {"kind": "model", **report["total"]}):
        launches = "no kernels" if kind["launches"] is None else kind["launches"]
        figures = (kind["count"], kind["nodes"], kind["custom"], launches)
        rows.append([kind["kind"], *figures, size(kind["bytes"]), round(kind["flops"] / 1e6)])
    click.echo(f"one decoded token after {context:,}; each line is one layer of its kind:")
    for line in table(rows):
        click.echo(line)


def _report(blocks: list[Block], context: int) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    for block in blocks:
        one = kinds.setdefault(block.kind, {"kind": block.kind, "count": 0, **_figures([block])})
        one["count"] += 1
    return {
        "context": context,
        "kinds": list(kinds.values()),
        "total": {"count": len(blocks), **_figures(blocks)},
    }


def _figures(blocks: list[Block]) -> dict[str, int | None]:
    from v4graph.passes.measure import sum_launches

    return {
        "nodes": sum(len(block.nodes) for block in blocks),
        "custom": sum(block.custom for block in blocks),
        "launches": sum_launches(block.launches for block in blocks),
        "bytes": sum(block.bytes for block in blocks),
        "flops": sum(block.flops for block in blocks),
    }
