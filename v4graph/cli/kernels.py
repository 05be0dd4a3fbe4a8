"""`v4graph kernels`: compile the CUDA kernels behind the plugins and the CPU kernels; list what is used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from v4graph.cli.output import progress
from v4graph.errors import EngineError

if TYPE_CHECKING:
    from v4graph_plugins.kernel_files import KernelFiles


@click.group()
def kernels() -> None:
    """Compile the kernels: CUDA ones behind the TensorRT plugins, native ones for onnxruntime on the CPU.

    \b
    v4graph kernels build sm120
    v4graph kernels build-cpu
    v4graph kernels list --json
    """


@kernels.command()
@click.argument("targets", nargs=-1)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: the installation's]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the bundle's index.")
def build(targets: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Compile the kernels for TARGETS (sm80, sm90, ...; all of them unless named) and to PTX.

    Needs nvcc 13.0 or newer (CUDA_HOME, PATH or /usr/local/cuda) and no GPU. What is up to date is not
    compiled again. Ends with 1 if a kernel breaks a limit: spilled registers, shared memory, or a launch
    plan that it does not fit.

    \b
    v4graph kernels build                # all targets, into the installation
    v4graph kernels build sm120 sm90     # two targets
    """
    from v4graph_plugins.bundle import ARCHITECTURES, build_bundle, find_nvcc
    from v4graph_plugins.catalogue import BUNDLE
    from v4graph_plugins.kernel_gates import problems

    compiler = find_nvcc(os.environ.get("CUDA_HOME", ""))
    with progress() as report:
        files = build_bundle(targets or tuple(ARCHITECTURES), compiler, report, out or BUNDLE)
    found = problems(files)
    if as_json:
        click.echo(json.dumps(files.index, indent=1))
    else:
        total = sum(
            file["bytes"] for part in files.index["targets"].values() for file in part["files"].values()
        )
        click.echo(
            f"{len(files.index['kernels'])} kernels for {', '.join(files.targets)} in {files.folder} "
            f"({total:,} bytes, nvcc {files.index['nvcc']}, PTX ISA {files.index['ptx_isa']})"
        )
    for sentence in found:
        click.echo(f"Error: {sentence}.", err=True)
    if found:
        raise click.exceptions.Exit(1)


@kernels.command("build-cpu")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File of the library.  [default: the installation's]"
)
@click.option("--sanitize", is_flag=True, help="With AddressSanitizer and UBSan, for tests; needs --out.")
def build_cpu(out: Path | None, sanitize: bool) -> None:
    """Compile the CPU kernels that sessions in onnxruntime load (plain, AVX2, AVX-512 and bfloat16).

    Needs g++ 12 or newer (CXX, or g++). What is up to date is not compiled again.
    V4GRAPH_CPU_LIBRARY names another library to load, V4GRAPH_CPU_ISA an instruction set other than the
    best.

    \b
    v4graph kernels build-cpu
    """
    from v4graph_runtime import cpu_kernels

    if sanitize and out is None:
        raise click.UsageError(
            "--sanitize needs --out: such a library only loads with the sanitizers' runtime."
        )
    path = out or cpu_kernels.LIBRARY
    with progress() as report:
        built = cpu_kernels.build_library(cpu_kernels.find_compiler(), path, sanitize=sanitize, report=report)
    sets = (
        ""
        if sanitize
        else f", {', '.join(cpu_kernels.instruction_sets(cpu_kernels.open_library(path)))} run here"
    )
    click.echo(f"{path} ({path.stat().st_size:,} bytes, {'compiled' if built else 'up to date'}{sets})")


@kernels.command("list")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle, or an engine's kernels/.")
@click.option("--json", "as_json", is_flag=True, help="Print the index.")
def list_(out: Path | None, as_json: bool) -> None:
    """List each kernel's parameters, threads, and registers per target, as a Markdown table.

    \b
    v4graph kernels list
    v4graph kernels list --out build/flash.engine/kernels --json
    """
    from v4graph_plugins.catalogue import BUNDLE
    from v4graph_plugins.kernel_files import KernelFiles

    files = KernelFiles.load(out or BUNDLE)
    if files is None:
        raise EngineError(
            f"{out or BUNDLE}: no kernels are compiled here; compile them with `v4graph kernels build`."
        )
    click.echo(json.dumps(files.index, indent=1) if as_json else "\n".join(_table(files)))


def _table(files: KernelFiles) -> Iterator[str]:
    targets = [name for name in files.targets if name != "portable"]
    yield f"| kernel | parameters | threads | {' | '.join(targets)} |"
    yield "|---" * (3 + len(targets)) + "|"
    for kernel, facts in files.index["kernels"].items():
        unit, _, name = kernel.partition(".")
        cells = [_used(files.index["targets"][t]["files"][unit]["resources"][name]) for t in targets]
        yield f"| {kernel} | {facts['arguments']} | {facts['threads']} | {' | '.join(cells)} |"


def _used(resources: dict[str, int]) -> str:
    spills = resources["spill_stores"] + resources["spill_loads"]
    return f"{resources['registers']}{f' ({spills} B spilled)' if spills else ''}"
