"""Times every op's kernels on this machine's GPU, beside torch and what the GPU can do.

In one run: the copy bandwidth and the bf16 and FP8 matrix rates that this GPU reaches, then each distinct
op call of Flash and Pro, in decode (1, 8, 64 slots; 4K, 128K, 1M tokens of context) and prefill (2K, 8K
tokens): microseconds, GB/s, TFLOP/s, percent of the measured ceiling, torch's time for the same work, and
whether the numbers are the reference's. Calls are replayed in a CUDA graph over rotating copies of their
inputs, so that weights come from memory and not from a cache.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from kernel_calls import WORKLOADS, Workload, distinct_calls, inputs_of, reference_bytes, torch_work
from torch import Tensor

from v4graph.config import ModelConfig
from v4graph.launch import PLANS
from v4graph.launch.calls import Call
from v4graph.launch.cost import COSTS
from v4graph.ops.tolerance import mismatch
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.emulator import Emulator
from v4graph_plugins.host import Host
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.launcher import DeviceTensor, OpCall

# Larger than the L2 cache of any GPU so far, so that rotating copies are read from memory.
ROTATE_BYTES, MOST_COPIES, COPIES_BYTES = 192 << 20, 24, 32 << 30
REFERENCE_BYTES = 24 << 30
SLOW = 0.01  # seconds
COLUMNS = (
    "model | workload | op | for | launches | MB | GFLOP | us | floor us | GB/s | TFLOP/s | % of floor | "
    "torch us | numbers"
)


@dataclass(frozen=True)
class Row:
    """One measured call; rates are of the bytes and FLOPs that the work cannot do without."""

    model: str
    workload: str
    op: str
    role: str
    launches: int
    megabytes: float
    gflop: float
    microseconds: float
    floor_us: float
    gb_per_s: float
    tflop_per_s: float
    percent: float
    torch_us: float | None
    agrees: str

    @property
    def cells(self) -> Iterable[str]:
        """The row as table cells."""
        yield from (self.model, self.workload, self.op, self.role, str(self.launches))
        yield from (f"{self.megabytes:.2f}", f"{self.gflop:.2f}", f"{self.microseconds:.1f}")
        yield from (f"{self.floor_us:.1f}", f"{self.gb_per_s:.0f}", f"{self.tflop_per_s:.1f}")
        yield f"{self.percent:.0f}"
        yield from ("-" if self.torch_us is None else f"{self.torch_us:.1f}", self.agrees)


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches here and now."""

    copy_gb_s: float
    bf16_tflop_s: float
    fp8_tflop_s: float | None


class Gpu:
    """Times work on the GPU."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise click.ClickException(
                "torch sees no NVIDIA GPU here; run where there is one, or try the script with --emulate."
            )
        torch.set_default_device("cuda")
        self.name = torch.cuda.get_device_name()
        target = f"sm{''.join(map(str, torch.cuda.get_device_capability()))}"
        found = Host().kernels(target)
        if found is None:
            raise click.ClickException(f"no kernels for {target}; compile them with `make kernels`.")
        self.launcher = KernelLauncher(CudaDriver(*found))

    def stream(self) -> int:
        """Return the stream that calls go to."""
        return int(torch.cuda.current_stream().cuda_stream)

    def seconds(self, work: Callable[[], Any], repeats: int = 5) -> float:
        """Return the median time of `work`, after one run that does not count."""
        work()
        times = []
        for _ in range(repeats):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[len(times) // 2]

    def seconds_as_graph(self, works: list[Callable[[], None]]) -> float:
        """Return the time of one of `works`, all replayed in one CUDA graph."""
        for work in works:
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for work in works:
                work()
        return self.seconds(graph.replay) / len(works)

    def ceilings(self) -> Ceilings:
        """Copy 1 GiB, and multiply 8192 x 8192 matrices in bf16 and e4m3."""
        source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8)
        target = torch.empty_like(source)
        copy = 2 * source.numel() / self.seconds(lambda: target.copy_(source)) / 1e9
        n = 8192
        a, b = torch.randn(n, n, dtype=torch.bfloat16), torch.randn(n, n, dtype=torch.bfloat16)
        bf16 = 2 * n**3 / self.seconds(lambda: a @ b) / 1e12
        if torch.cuda.get_device_capability() < (8, 9):
            return Ceilings(copy, bf16, None)
        qa, qb = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), dtype=torch.float32)
        took = self.seconds(lambda: torch._scaled_mm(qa, qb, one, one, out_dtype=torch.bfloat16))
        return Ceilings(copy, bf16, 2 * n**3 / took / 1e12)


class Emulated(Gpu):
    """The same on the CPU, to try this script; its times mean nothing."""

    def __init__(self) -> None:
        self.name, self.launcher = "the emulator", KernelLauncher(Emulator())

    def stream(self) -> int:
        return 0

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def seconds_as_graph(self, works: list[Callable[[], None]]) -> float:
        return self.seconds(works[0])

    def ceilings(self) -> Ceilings:
        return Ceilings(1.0, 1.0, None)


class Prepared:
    """One copy of a call's tensors."""

    def __init__(self, call: Call, inputs: list[Tensor], machine: Gpu) -> None:
        self.call, self.inputs, self.machine = call, inputs, machine
        named = dict(zip((port.name for port in call.spec.inputs), inputs, strict=True))
        shapes = call.spec.output_shapes({n: tuple(t.shape) for n, t in named.items()}, call.attributes)
        self.outputs = [
            named[port.alias]
            if port.alias
            else torch.empty(
                shape, dtype=torch.bfloat16 if "bfloat16" in port.dtypes else getattr(torch, port.dtypes[0])
            )
            for port, shape in zip(call.spec.outputs, shapes, strict=True)
        ]
        scratch = machine.launcher.workspace_bytes(call.spec, call.attributes, call.shapes)
        self.workspace = torch.empty(scratch, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Memory of one copy."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.outputs, self.workspace))

    def launch(self) -> None:
        """Enqueue the call."""
        inputs, outputs = ([_device_tensor(t) for t in part] for part in (self.inputs, self.outputs))
        call, machine = self.call, self.machine
        machine.launcher.launch(
            OpCall(call.spec, call.attributes, inputs, outputs, self.workspace.data_ptr(), machine.stream())
        )

    def compare(self) -> str:
        """Run once and compare with the reference: ok, or what differs."""
        call, inputs = self.call, [tensor.clone() for tensor in self.inputs]
        want = call.spec.reference(*inputs, *(call.attributes[name] for name in call.spec.attributes))
        self.launch()
        for got, expected in zip(self.outputs, want if isinstance(want, tuple) else (want,), strict=True):
            arrays = [(t.float() if t.is_floating_point() else t).cpu().numpy() for t in (got, expected)]
            if text := mismatch(call.spec, arrays[0], arrays[1], call.attributes, "bfloat16"):
                return text
        return "ok"


def _device_tensor(tensor: Tensor) -> DeviceTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return DeviceTensor(tensor.data_ptr(), tuple(tensor.shape), dtype)


def _torch_seconds(work: Callable[[], Any], machine: Gpu) -> float:
    """Return torch's time, of one run where that is long."""
    once = machine.seconds(work, 1)
    return once if once > SLOW else machine.seconds(work, 3)


def measure(model: str, work: Workload, call: Call, machine: Gpu, top: Ceilings) -> Row:
    """Measure one call."""
    nbytes, flops = COSTS[call.op].of(call, work.context)
    first = Prepared(call, inputs_of(call, work.context), machine)
    agrees, torch_us = "not compared (memory)", None
    if reference_bytes(call) < REFERENCE_BYTES:
        try:
            agrees = first.compare()
            torch_us = _torch_seconds(torch_work(call, first.inputs), machine) * 1e6
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
    wanted = -(-ROTATE_BYTES // max(1, nbytes))
    count = max(1, min(MOST_COPIES, wanted, COPIES_BYTES // max(1, first.nbytes)))
    copies = [first]
    copies += [Prepared(call, [t.clone() for t in first.inputs], machine) for _ in range(count - 1)]
    took = machine.seconds_as_graph([copy.launch for copy in copies])
    floor = max(nbytes / (top.copy_gb_s * 1e9), flops / (top.bf16_tflop_s * 1e12))
    return Row(
        model=model,
        workload=work.name,
        op=call.op,
        role=call.role,
        launches=len(call.launches(PLANS).launches),
        megabytes=nbytes / 1e6,
        gflop=flops / 1e9,
        microseconds=took * 1e6,
        floor_us=floor * 1e6,
        gb_per_s=nbytes / took / 1e9,
        tflop_per_s=flops / took / 1e12,
        percent=100 * floor / took,
        torch_us=torch_us,
        agrees=agrees,
    )


def table(rows: list[Row], top: Ceilings, device: str) -> str:
    """Return the rows as a Markdown page."""
    fp8 = f", {top.fp8_tflop_s:.0f} TFLOP/s FP8 matmul" if top.fp8_tflop_s else ""
    rates = f"{top.copy_gb_s:.0f} GB/s copy, {top.bf16_tflop_s:.0f} TFLOP/s bf16 matmul{fp8}"
    lines = [f"# Kernels on {device}", "", f"Measured in the same run: {rates}.", "", f"| {COLUMNS} |"]
    lines.append("|---" * (COLUMNS.count("|") + 1) + "|")
    lines += [f"| {' | '.join(row.cells)} |" for row in rows]
    return "\n".join(lines) + "\n"


def write(out: Path, rows: list[Row], top: Ceilings, device: str) -> None:
    """Write kernels.json and kernels.md."""
    out.mkdir(parents=True, exist_ok=True)
    data = {"device": device, "torch": torch.__version__, "ceilings": asdict(top)}
    data["rows"] = [asdict(row) for row in rows]
    for name, text in (
        ("kernels.json", json.dumps(data, indent=1)),
        ("kernels.md", table(rows, top, device)),
    ):
        partial = out / f"{name}.partial"
        partial.write_text(text)
        partial.replace(out / name)


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=("flash", "pro"), show_default=True)
@click.option("--only", multiple=True, help="Measure these ops only.")
@click.option("--workload", "chosen", multiple=True, help="Measure workloads whose name contains this.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder of kernels.json and kernels.md."
)
@click.option(
    "--limit-s", default=420.0, show_default=True, help="Start no measurement after this many seconds."
)
@click.option("--experts", type=int, help="Shrink the models to this many experts, for small memories.")
@click.option("--emulate", is_flag=True, help="Try this script on the emulator, without a GPU.")
def main(
    models: tuple[str, ...],
    only: tuple[str, ...],
    chosen: tuple[str, ...],
    out: Path,
    limit_s: float,
    experts: int | None,
    emulate: bool,
) -> None:
    """Measure and write."""
    begin, machine = time.monotonic(), Emulated() if emulate else Gpu()
    top, rows, seen = machine.ceilings(), list[Row](), set[Any]()
    click.echo(f"{machine.name}: {asdict(top)}")
    works = [work for work in WORKLOADS if not chosen or any(text in work.name for text in chosen)]
    for work in works:
        for model in models:
            config = ModelConfig.load(model).shrink(experts=experts)
            for call in distinct_calls(config, work):
                if call.key in seen or (only and call.op not in only):
                    continue
                if time.monotonic() - begin > limit_s:
                    click.echo(f"stopped before {model} {work.name} {call.op}: --limit-s {limit_s}", err=True)
                    write(out, rows, top, machine.name)
                    return
                seen.add(call.key)
                with torch.inference_mode():
                    rows.append(row := measure(model, work, call, machine, top))
                click.echo(" | ".join(row.cells))
                gc.collect()
    write(out, rows, top, machine.name)


if __name__ == "__main__":
    main()
