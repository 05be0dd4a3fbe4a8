"""Tokens per second of the engine loop with 1, 4 and 16 slots, the same requests, in one run.

    python benchmarks/batching.py build/batching --csv benchmarks/batching.csv

Every request has a prompt of 8 to 64 tokens and 64 new ones, greedy, and all are submitted at once. The
slot counts take turns, round by round; medians. `--checkpoint` takes another model than nano: the larger its
weights, the more it pays to read them once for 16 tokens. Before that: what a decoded token of one slot of
16 costs by itself (a range of slots), with the others idle beside it, and with all 16 decoding.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import time
from pathlib import Path

import numpy as np

from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_runtime import Session, Tokenizer
from v4graph_runtime.build import build_engine
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.serving import Engine, RequestOptions

SLOTS = (1, 4, 16)
NANO = Path(__file__).parents[1] / "models" / "nano"
COLUMNS = ("date", "model", "slots", "requests", "tokens_per_second", "ratio", "steps", "rounds")


def main() -> None:
    arguments = _arguments()
    engine_dir = arguments.engine or _engine(arguments.folder, arguments.checkpoint)
    prompts = _prompts(arguments.requests)
    options = OrtOptions(threads=arguments.threads)
    engines = {}
    for slots in SLOTS:
        session = Session(engine_dir, arguments.checkpoint, batch=slots, options=options)
        engines[slots] = Engine(session, Tokenizer.load(NANO))
    _print_ranges(engine_dir, arguments.checkpoint, options)
    seconds: dict[int, list[float]] = {slots: [] for slots in SLOTS}
    outputs = {slots: _round(engine, prompts, arguments.new_tokens)[1] for slots, engine in engines.items()}
    for _ in range(arguments.rounds):
        for slots, engine in engines.items():
            seconds[slots].append(_round(engine, prompts, arguments.new_tokens)[0])
    rates = {
        slots: arguments.requests * arguments.new_tokens / statistics.median(times)
        for slots, times in seconds.items()
    }
    rows = []
    for slots, rate in rates.items():
        steps, ratio = engines[slots].stats().steps // (arguments.rounds + 1), rate / rates[1]
        run = (arguments.requests, f"{rate:.0f}", f"{ratio:.2f}", steps, arguments.rounds)
        rows.append((datetime.date.today().isoformat(), arguments.checkpoint.name, slots, *run))
        same = sum(a == b for a, b in zip(outputs[slots], outputs[1], strict=True))
        print(
            f"{slots:3} slots: {rate:7,.0f} tokens/s, {ratio:5.2f} x, {steps:6,} steps; "
            f"{same} of {arguments.requests} outputs equal to those with 1 slot"
        )
    for engine in engines.values():
        engine.close()
    if arguments.csv:
        _append(arguments.csv, rows)


def _print_ranges(engine_dir: Path, checkpoint: Path, options: OrtOptions) -> None:
    """Print the milliseconds of a decoded token for one slot alone, one of 16 and all 16, in turns."""
    batch = max(SLOTS)
    first = np.eye(1, batch, dtype=np.int64)[0]
    with Session(engine_dir, checkpoint, batch=batch, options=options) as session:
        ids = np.full((batch, 1), 5)
        session.prefill(np.full((batch, 64), 5))
        calls = {
            "1 slot, by a range": lambda: session.decode(ids[:1], slots=range(1)),
            f"1 slot, {batch - 1} idle": lambda: session.decode(ids, first),
            f"{batch} slots": lambda: session.decode(ids),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(60):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began)
    for name, taken in times.items():
        print(f"a decoded token of {name}: {statistics.median(taken) * 1e3:.2f} ms")


def _round(engine: Engine, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
    began = time.perf_counter()
    options = RequestOptions(new_tokens, stop_ids=())
    generations = [engine.submit(prompt, options) for prompt in prompts]
    for generation in generations:
        generation.text()
    return time.perf_counter() - began, [generation.ids for generation in generations]


def _prompts(count: int) -> list[list[int]]:
    text = (NANO / "heldout.txt").read_text("utf-8")
    ids = Tokenizer.load(NANO).encode(text)
    random = np.random.default_rng(0)
    starts = random.integers(0, len(ids) - 256, count)
    return [
        ids[start : start + size] for start, size in zip(starts, random.integers(8, 65, count), strict=True)
    ]


def _engine(folder: Path, checkpoint: Path) -> Path:
    """Export and build once; remove the folder to make it again."""
    engine = folder / f"{checkpoint.name}.engine"
    if not engine.is_dir():
        graph = folder / f"{checkpoint.name}.graph"
        if not graph.is_dir():
            export_graph(resolve(str(checkpoint)), graph, ExportOptions(max_seq_len=1024))
        build_engine(graph, engine)
    return engine


def _append(path: Path, rows: list[tuple[object, ...]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where graph and engine are, made if they are not there")
    parser.add_argument("--checkpoint", type=Path, default=NANO, help="default: models/nano")
    parser.add_argument("--engine", type=Path, help="an engine of that model, instead of one in FOLDER")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
