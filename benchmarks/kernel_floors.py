"""Fills the tables of docs/kernels.md: launches, bytes, FLOPs and floors per op, and what is implemented.

`python benchmarks/kernel_floors.py` rewrites what stands between the markers of the page; the rest of it is
written by hand. Needs no GPU. Measured times, and the rates that floors are computed with, are those of a
Hopper GPU's kernels.json under benchmarks, an H200's if there is one; without a record, an H200's rates are
assumed. Coverage is that of the bundle that is compiled here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import onnx
from kernel_calls import Workload, distinct_calls

from v4graph.config import ModelConfig
from v4graph.launch import PLANS
from v4graph.launch.calls import Call
from v4graph.launch.cost import COSTS
from v4graph.ops import OpSpec
from v4graph_plugins.catalogue import BUNDLE, PLUGIN_OPS
from v4graph_plugins.kernel_files import KernelFiles

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "kernels.md"
BODIES = REPO / "export" / "v4graph_export" / "bodies"
ASSUMED = {"device": "an H200 (assumed)", "ceilings": {"copy_gb_s": 4300, "bf16_tflop_s": 790}, "rows": []}
TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121", "portable")
WORKLOADS = (Workload("decode B=1 4K", 1, 1, 4096), Workload("prefill 2K", 1, 2048, 0))


@functools.cache
def record() -> Mapping[str, Any]:
    """Return what `make bench-gpu` wrote on an H200, else on an H100, else what is assumed."""
    for folder in ("h200", "h100"):
        path = REPO / "benchmarks" / folder / "kernels.json"
        if path.is_file():
            found: Mapping[str, Any] = json.loads(path.read_text())
            return found
    return ASSUMED


def floor_us(call: Call, context: int) -> tuple[int, int, float]:
    """Return bytes, FLOPs and the microseconds below which the GPU of the record cannot do them."""
    nbytes, flops = COSTS[call.op].of(call, context)
    rates = record()["ceilings"]
    return nbytes, flops, max(nbytes / rates["copy_gb_s"] / 1e3, flops / rates["bf16_tflop_s"] / 1e6)


def measured() -> Mapping[tuple[str, str, str], float]:
    """Return microseconds of Flash calls by (workload, op, role)."""
    rows = [row for row in record()["rows"] if row["model"] == "flash"]
    return {(row["workload"], row["op"], row["role"]): row["microseconds"] for row in rows}


def _amount(value: float, unit: str) -> str:
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def floors() -> str:
    """Return the table of floors at Flash's shapes."""
    config, times, rates = ModelConfig.load("flash"), measured(), record()["ceilings"]
    copy, multiply = f"{rates['copy_gb_s'] / 1e3:.2f} TB/s", f"{rates['bf16_tflop_s']:.0f} TFLOP/s"
    lines = [f"{record()['device']}: copies {copy}, multiplies {multiply} in bf16.", ""]
    for work in WORKLOADS:
        lines += [
            f"**Flash, {work.name}**",
            "",
            "| op | for | launches | bytes | FLOPs | floor us | measured us | of the floor |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for call in distinct_calls(config, work):
            nbytes, flops, floor = floor_us(call, work.context)
            time = times.get((work.name, call.op, call.role))
            launches = len(call.launches(PLANS).launches)
            lines.append(
                f"| {call.op} | {call.role} | {launches} | {_amount(nbytes, 'B')} | "
                f"{_amount(flops, 'FLOP')} | "
                f"{floor:.2f} | {'- | -' if time is None else f'{time:.1f} | {floor / time:.0%}'} |"
            )
        lines.append("")
    return "\n".join(lines).strip()


@functools.cache
def prebuilt_bodies() -> frozenset[str]:
    """Return the ops whose exported function body ships with the exporter."""
    functions = onnx.load(BODIES / "float32.onnx").functions
    return frozenset(function.name.partition("__")[0] for function in functions)


def has_body(spec: OpSpec) -> bool:
    """Whether an op has a function body, prebuilt or written by hand."""
    return spec.body is not None or spec.name in prebuilt_bodies()


def kernels_of(spec: OpSpec) -> Iterable[str]:
    """Return the kernels that an op's plan may launch."""
    return dict.fromkeys(step.kernel for step in PLANS[spec.name].steps)


def compiled(spec: OpSpec, files: KernelFiles | None, target: str) -> bool:
    """Whether the bundle has every kernel that an op's plan may launch."""
    if files is None or target not in files.targets:
        return False
    units = files.index["targets"][target]["files"]
    return all(
        kernel in files.index["kernels"] and kernel.partition(".")[0] in units for kernel in kernels_of(spec)
    )


def coverage() -> str:
    """Return which op has which implementation, as it is in the bundle that is compiled here."""
    files = KernelFiles.load(BUNDLE)
    lines = [
        f"| op | torch reference | body in onnxruntime | kernels, emulated in CI | {' | '.join(TARGETS)} |",
        "|---" * (4 + len(TARGETS)) + "|",
    ]
    for spec in PLUGIN_OPS:
        names = ", ".join(f"`{kernel.partition('.')[2]}`" for kernel in kernels_of(spec))
        cells = ["yes" if compiled(spec, files, target) else "no" for target in TARGETS]
        body = "yes" if has_body(spec) else "no"
        lines.append(f"| {spec.name} | yes | {body} | {names} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"floors": floors, "coverage": coverage}


def filled(text: str) -> str:
    """Return a page with every table between `<!-- name -->` and `<!-- /name -->` made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)
    return text


@click.command(help=__doc__)
def main() -> None:
    """Rewrite the page."""
    text = filled(PAGE.read_text())
    partial = PAGE.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(PAGE)
    click.echo(f"wrote {PAGE.relative_to(REPO)}")


if __name__ == "__main__":
    main()
