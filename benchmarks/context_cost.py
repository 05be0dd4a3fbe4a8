"""Time of one decoded token with 4K to 1M tokens of state, a CSA layer and an HCA layer at Flash width.

    python benchmarks/context_cost.py build/context-cost --csv benchmarks/context_cost.csv

Makes a checkpoint of two layers (few experts, a small vocabulary), an engine that holds 1,048,576 tokens, and
a session whose caches are filled with random entries, rounded as the compressors round them. Nothing needs to
be prefilled: a step reads what it would read after so many real tokens. Contexts take turns, round by round.

What must grow with the context is what the layers read of their caches: printed in ms at the rate at which
this machine reads memory in the same run, and the measured growth as a multiple of it ("of reads"). Attention
does some 64 multiplications per value that it reads, so HCA's growth has a second floor, its float32 products
at the rate of onnxruntime's MatMul; "of floor" takes the longer of the two for HCA. The ops that read the
caches are also timed alone, on the same caches.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from context_ops import RATIOS, Call, lone_op, multiplication

from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import pack
from v4graph.config import ModelConfig
from v4graph.numerics import fake_fp4, fake_fp8
from v4graph.planning.cache import CacheFormat
from v4graph.planning.work import Step, cache_rows, flops_by_part
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_runtime import Session
from v4graph_runtime.bench import read_rate
from v4graph_runtime.build import build_engine
from v4graph_runtime.ort_backend import OrtOptions, available_cores

CONTEXTS = (4_096, 32_768, 131_072, 524_288, 1_048_576)
EXPERTS, VOCABULARY = 8, 1280
FLOAT32 = CacheFormat("fp32", "fp32")
PARTS = ("index keys", "compressed (CSA)", "compressed (HCA)")
OPS = {
    "V4IndexTopK": "state.0.index_keys",
    "V4SelectedAttention": "state.0.compressed",
    "V4CompressedAttention": "state.1.compressed",
}
COLUMNS = {
    "context": "{:,.0f}",
    "ms": "{:.2f}",
    "times": "{:.2f} x",
    "extra ms": "{:.2f}",
    "index MB": "{:.1f}",
    "selected MB": "{:.1f}",
    "HCA MB": "{:.1f}",
    "reads ms": "{:.2f}",
    "of reads": "{:.2f}",
    "products ms": "{:.2f}",
    "of floor": "{:.2f}",
    "indexer alone": "{:.2f}",
    "selected alone": "{:.2f}",
    "HCA alone": "{:.2f}",
}


@dataclass
class Times:
    """Samples in seconds: of a token by context, of an op alone by context and name, of 1024^3 products."""

    token: dict[int, list[float]]
    alone: dict[tuple[int, str], list[float]]
    product: list[float]
    read_rates: list[float]


@dataclass(frozen=True)
class Rates:
    """What the machine reaches: bytes read and float32 operations per second."""

    read: float
    flops: float


def two_layers() -> ModelConfig:
    """Return Flash with one CSA layer and one HCA layer, few experts and a small vocabulary."""
    raw = json.loads(json.dumps(ModelConfig.load("flash").raw))
    raw |= {"num_hidden_layers": len(RATIOS), "compress_ratios": list(RATIOS), "num_hash_layers": 0}
    raw |= {"num_nextn_predict_layers": 0, "n_routed_experts": EXPERTS, "vocab_size": VOCABULARY}
    return ModelConfig.from_dict(raw, source="two layers of flash")


def prepare(folder: Path) -> tuple[Path, Path]:
    """Return engine and packed checkpoint, made where they are missing."""
    packed, engine = folder / "packed", folder / "engine"
    if not packed.is_dir():
        init(two_layers(), folder / "plain", 0)
        pack(folder / "plain", packed)
    if not engine.is_dir():
        options = ExportOptions(numerics="v4", max_seq_len=max(CONTEXTS))
        export_graph(resolve(str(packed)), folder / "graph", options)
        build_engine(folder / "graph", engine)
    return engine, packed


def states(session: Session) -> dict[str, np.ndarray]:
    """Return the session's state tensors by name, in place."""
    found = {}
    for name, value in session._backend._buffers[0].items():  # type: ignore[union-attr]
        count = math.prod(value.shape())
        memory = (ctypes.c_float * count).from_address(value.data_ptr())
        found[name] = np.frombuffer(memory, np.float32).reshape(value.shape())
    return found


def fill(held: Mapping[str, np.ndarray]) -> None:
    """Write random entries: rounded to FP4 and FP8 where the compressors round them."""
    random = np.random.default_rng(0)
    for name, array in held.items():
        rows = array.reshape(-1, array.shape[-1])
        kind = name.rpartition(".")[2]
        for first in range(0, len(rows), 2_048):
            part = rows[first : first + 2_048]
            values = random.standard_normal(part.shape, np.float32)
            if kind == "index_keys":
                values = fake_fp4(values)
            elif kind in ("compressed", "window"):
                values[:, :-64] = fake_fp8(values[:, :-64], 64)
            part[...] = values


def decode(session: Session, context: int, steps: int) -> float:
    """Return the median seconds of the tokens that end at `context`."""
    session._positions.tokens[:] = context - steps
    times = []
    for token in range(steps):
        begin = time.perf_counter()
        session.decode([token])
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def seconds(call: Call, calls: int) -> float:
    """Return the median seconds of a call."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure(session: Session, config: ModelConfig, arguments: argparse.Namespace) -> Times:
    """Time everything in turn, round by round, after one round that does not count."""
    held, threads = states(session), arguments.threads
    makers = {op: lone_op(op, config, held[cache], threads) for op, cache in OPS.items()}
    calls = {(context, op): make(context) for context in arguments.contexts for op, make in makers.items()}
    product = multiplication(threads)
    times = Times({context: [] for context in arguments.contexts}, {key: [] for key in calls}, [], [])
    for turn in range(arguments.rounds + 1):
        print(f"round {turn} of {arguments.rounds}", end="\r", file=sys.stderr, flush=True)
        times.read_rates.append(read_rate(threads, 3) or math.nan)
        times.product.append(seconds(product, 5))
        for context in arguments.contexts:
            times.token[context].append(decode(session, context, arguments.steps))
        for key, call in calls.items():
            times.alone[key].append(seconds(call, 5))
    return times


def middle(samples: list[float]) -> float:
    """Return the median of all rounds but the first."""
    return statistics.median(samples[1:])


def reads(config: ModelConfig, context: int) -> list[int]:
    """Return the bytes of index keys, selected rows and HCA rows that the token after `context - 1` reads."""
    found: dict[str, int] = {}
    for layer in config.layers:
        found |= cache_rows(config, layer, Step(1, 1, context - 1), FLOAT32)
    return [found[part] for part in PARTS]


def lines(config: ModelConfig, times: Times, rates: Rates) -> Iterator[dict[str, float]]:
    """Yield a row per context; growth is counted from the first."""
    contexts = list(times.token)
    base, first = middle(times.token[contexts[0]]), reads(config, contexts[0])
    attention = {c: flops_by_part(config, Step(1, 1, c - 1), FLOAT32)[0]["attention"] for c in contexts}
    for context in contexts:
        token, read = middle(times.token[context]), reads(config, context)
        index, chosen, hca = ((a - b) / rates.read * 1e3 for a, b in zip(read, first, strict=True))
        products = (attention[context] - attention[contexts[0]]) / rates.flops * 1e3
        extra, least, floor = (token - base) * 1e3, index + chosen + hca, index + chosen + max(hca, products)
        numbers = [context, token * 1e3, token / base, extra, *(size / 1e6 for size in read)]
        numbers += [
            least,
            extra / least if least else math.nan,
            products,
            extra / floor if floor else math.nan,
        ]
        numbers += [middle(times.alone[context, op]) * 1e3 for op in OPS]
        yield dict(zip(COLUMNS, numbers, strict=True))


def show(rows: list[dict[str, float]]) -> None:
    """Print the table."""
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for row in rows:
        cells = ["" if math.isnan(value) else COLUMNS[name].format(value) for name, value in row.items()]
        print("| " + " | ".join(cells) + " |")


def resident() -> dict[str, int]:
    """Return anonymous and file-backed resident bytes of this process."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where checkpoint (0.4 GB) and engine are, or will be made")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens of state (all five)"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads (all cores)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count, after one that does not")
    parser.add_argument("--steps", type=int, default=12, help="tokens per context and round")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    engine, checkpoint = prepare(arguments.folder)
    config = ModelConfig.load(checkpoint)
    session = Session(engine, checkpoint, options=OrtOptions(threads=arguments.threads))
    session.prefill([[1]])
    opened = resident()["RssAnon"]
    fill(states(session))
    filled = resident()["RssAnon"]
    for context in arguments.contexts:
        decode(session, context, 4)
    grown = resident()["RssAnon"]
    times = measure(session, config, arguments)
    rates = Rates(middle(times.read_rates), 2 * 1024**3 / middle(times.product))
    rows = list(lines(config, times, rates))
    show(rows)
    print(
        f"\n{arguments.threads} threads, medians of {arguments.rounds} rounds; memory is read at "
        f"{rates.read / 1e9:.1f} GB/s, MatMul runs at {rates.flops / 1e9:.0f} GFLOP/s\n"
        f"state {session.state_bytes / 1e6:.1f} MB; anonymous memory: {opened / 1e6:.0f} MB before the "
        f"caches are filled, {(filled - opened) / 1e6:.1f} MB more with them, "
        f"{(grown - filled) / 1e6:.1f} MB more after decoding at every context"
    )
    if arguments.csv:
        append(arguments.csv, rows, rates, arguments.threads)


def append(path: Path, rows: list[dict[str, float]], rates: Rates, threads: int) -> None:
    """Add the rows to a CSV file."""
    fresh = not path.exists()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = [threads, f"{rates.read / 1e9:.2f}", f"{rates.flops / 1e9:.1f}"]
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            names = [name.lower().replace(" ", "_") for name in COLUMNS]
            writer.writerow(["date", "threads", "read_gb_per_s", "matmul_gflop_per_s", *names])
        for row in rows:
            writer.writerow([today, *machine, *(f"{value:.7g}" for value in row.values())])


if __name__ == "__main__":
    main()
