"""Ops of one decoded token at Flash width: GB/s of weights beside the machine's read rate, in one run.

Each op has several sets of weights, more than the caches hold; one run of the session calls it on all of
them, so that weights come from memory as in a model. Rounds of all ops and of the plain read alternate;
medians are printed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from op_sessions import open_graph

from v4graph.ops import DOMAIN, OPS_BY_NAME
from v4graph.ort import host_value
from v4graph_export.functions import OPSETS
from v4graph_runtime import cpu_kernels

TYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "int32": ir.DataType.INT32,
}
WEIGHTS = 600 << 20  # bytes of distinct weights per op


@dataclass
class Op:
    """One op call: inputs by port (an array, or shape and dtype of random weights) and the bytes it reads."""

    name: str
    op: str
    inputs: dict[str, Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    read: int = 0


def weight(rows: int, columns: int, kind: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows * 7 + columns)
    if kind in ("float32", "bfloat16"):
        return {"": random.standard_normal((rows, columns), dtype=np.float32).astype(kind, copy=False)}
    codes = random.integers(0, 120, (rows, columns if kind == "fp8" else columns // 2), dtype=np.int8)
    shape = (-(-rows // 128), columns // 128) if kind == "fp8" else (rows, columns // 32)
    return {"": codes, "_scale": random.integers(110, 120, shape, dtype=np.int8)}


def linear(name: str, rows: int, columns: int, kind: str) -> Op:
    x = np.random.default_rng(1).standard_normal((1, 1, columns), dtype=np.float32)
    parts = weight(rows, columns, kind)
    inputs: dict[str, Any] = {"x": x, "weight": parts[""]}
    if kind == "fp8":
        inputs["scale"] = parts["_scale"]
    op = "V4Fp8Linear" if kind == "fp8" else "V4LinearF32"
    return Op(name, op, inputs, read=sum(part.nbytes for part in parts.values()))


def moe(width: int, inner: int, experts: int, topk: int) -> Op:
    random = np.random.default_rng(3)
    inputs: dict[str, Any] = {
        "u": random.standard_normal((1, 1, width), dtype=np.float32),
        "ids": np.zeros((1, 1, topk), np.int32),
        "weights": np.full((1, 1, topk), 0.2, np.float32),
    }
    read = 0
    for kind, prefix in (("fp4", "w"), ("fp8", "s")):
        for index in "132":
            rows, columns = (width, inner) if index == "2" else (inner, width)
            for suffix, part in weight(rows, columns, kind).items():
                stacked = np.stack([part] * experts) if prefix == "w" else part
                inputs[f"{prefix}{index}{suffix}"] = stacked
                read += part.nbytes * (topk if prefix == "w" else 1)
    return Op(f"MoE {topk} of {experts} FP4 + shared FP8", "V4MoE", inputs, {"limit": 10.0}, read)


def calls_of(op: Op) -> list[dict[str, np.ndarray]]:
    """Return the inputs of as many calls as the op has sets of weights; of experts, each takes others."""
    if op.op == "V4MoE":
        experts, ids = op.inputs["w1"].shape[0], op.inputs["ids"]
        chosen = np.arange(experts // ids.size * ids.size, dtype=np.int32).reshape(-1, *ids.shape)
        return [{**op.inputs, "ids": one} for one in chosen]
    copies = max(2, WEIGHTS // op.read)
    return [
        {name: array if turn == 0 or array.ndim == 3 else array.copy() for name, array in op.inputs.items()}
        for turn in range(copies)
    ]


def graph_of(op: Op, calls: list[dict[str, np.ndarray]]) -> tuple[ir.Graph, dict[str, np.ndarray]]:
    """Return a graph with all calls, as a model's has many, and what its inputs are bound to."""
    spec = OPS_BY_NAME[op.op]
    attributes = [ir.convenience.convert_attribute(k, v) for k, v in op.attributes.items()]
    values: dict[int, ir.Value] = {}
    bound: dict[str, np.ndarray] = {}
    nodes = []
    for turn, call in enumerate(calls):
        for name, array in call.items():
            if id(array) not in values:
                kind, shape = ir.TensorType(TYPES[str(array.dtype)]), ir.Shape([None] * array.ndim)
                values[id(array)] = ir.Value(name=f"{name}.{turn}", type=kind, shape=shape)
                bound[f"{name}.{turn}"] = array
        inputs = [values[id(array)] for array in call.values()]
        node = ir.Node(DOMAIN, op.op, inputs, attributes, num_outputs=len(spec.outputs))
        for value, port in zip(node.outputs, spec.outputs, strict=True):
            value.name, value.type = f"out_{port.name}.{turn}", ir.TensorType(ir.DataType.FLOAT)
            value.shape = ir.Shape([None] * len(port.dims))
        nodes.append(node)
    outputs = [value for node in nodes for value in node.outputs]
    graph = ir.Graph(list(values.values()), outputs, nodes=nodes, opset_imports=dict(OPSETS), name="calls")
    return graph, bound


def open_op(op: Op, threads: int) -> tuple[Callable[[], None], int]:
    """Return a run of the op on each of its sets of weights, and how many these are."""
    calls = calls_of(op)
    graph, bound = graph_of(op, calls)
    session = open_graph(graph, threads)
    binding = session.io_binding()
    for name, array in bound.items():
        binding.bind_ortvalue_input(name, host_value(onnxruntime, array))
    for value in graph.outputs:
        binding.bind_output(value.name)

    def run() -> None:
        session.run_with_iobinding(binding)

    run.__dict__["keep"] = bound
    return run, len(calls)


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    ops = [
        linear("FP8 linear 4096 -> 1024 (wq_a)", 1024, 4096, "fp8"),
        linear("FP8 linear 1024 -> 32768 (wq_b)", 32768, 1024, "fp8"),
        linear("FP8 linear 8192 -> 4096 (wo_b)", 4096, 8192, "fp8"),
        linear("bf16 linear 4096 -> 1024 (wkv of a compressor)", 1024, 4096, "bfloat16"),
        linear("bf16 linear 4096 -> 16384 (an eighth of the head)", 16384, 4096, "bfloat16"),
        linear("float32 linear 4096 -> 1024", 1024, 4096, "float32"),
        moe(4096, 2048, 64, 6),
    ]
    runs = [open_op(op, arguments.threads) for op in ops]
    library = cpu_kernels.open_library(cpu_kernels.LIBRARY)
    memory = np.ones(1 << 27, np.int64)
    reads: list[float] = []
    times: list[list[float]] = [[] for _ in ops]
    for _ in range(arguments.rounds):
        begin = time.perf_counter()
        library.v4graph_cpu_read(memory.ctypes.data, memory.nbytes, arguments.threads)
        reads.append(memory.nbytes / (time.perf_counter() - begin) / 1e9)
        for (run, calls), found in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            found.append((time.perf_counter() - begin) / calls)
    rate = statistics.median(reads)
    print(f"read rate {rate:.1f} GB/s, {arguments.threads} threads, median of {arguments.rounds} rounds\n")
    print("| op | MB of weights | us | GB/s | of the read rate |\n|---|---|---|---|---|")
    rows = []
    for op, found in zip(ops, times, strict=True):
        seconds = statistics.median(found)
        speed = op.read / seconds / 1e9
        print(f"| {op.name} | {op.read / 1e6:.1f} | {seconds * 1e6:.0f} | {speed:.1f} | {speed / rate:.0%} |")
        rows.append([op.name, op.read, f"{seconds:.6f}", f"{speed:.2f}", f"{rate:.2f}", arguments.threads])
    if arguments.csv:
        fresh = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["date", "op", "bytes", "seconds", "gb_per_s", "read_gb_per_s", "threads"])
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            writer.writerows([today, *row] for row in rows)


if __name__ == "__main__":
    main()
