"""Time to the first token of a prompt that begins like one before, with and without the prefix cache.

    python benchmarks/prefix_reuse.py build/prefix-reuse --csv benchmarks/prefix_reuse.csv

Exports nano with exact numerics and room for 8,192 tokens. A prompt of 4,096 tokens is read and its state
kept every 512 tokens, as the engine loop does; the second prompt shares the first 90 % of it. Rounds in turn:
the second prompt read whole, with the cache in memory, with the cache in a folder opened anew. The logits
after it must agree within 1e-4, or the run fails.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_runtime import PrefixCache, Session, Tokenizer, build_engine
from v4graph_runtime.ort_backend import OrtOptions, available_cores

NANO = Path(__file__).resolve().parents[1] / "models" / "nano"
CAPACITY, TOLERANCE = 8192, 1e-4
COLUMNS = {
    "prompt": "{:,.0f}",
    "shared": "{:,.0f}",
    "reused": "{:,.0f}",
    "whole ms": "{:.1f}",
    "memory ms": "{:.1f}",
    "folder ms": "{:.1f}",
    "memory ratio": "{:.1f} x",
    "folder ratio": "{:.1f} x",
    "first ms": "{:.1f}",
    "first kept ms": "{:.1f}",
    "cache MB": "{:.2f}",
    "difference": "{:.1e}",
}


def prepare(folder: Path) -> Path:
    """Return the engine, made where it is missing."""
    engine = folder / "engine"
    if not engine.is_dir():
        options = ExportOptions(numerics="exact", max_seq_len=CAPACITY)
        export_graph(resolve(str(NANO)), folder / "graph", options)
        build_engine(folder / "graph", engine)
    return engine


def prompts(tokens: int, shared: float) -> tuple[Any, Any]:
    """Return two texts of so many tokens; the second leaves the first after a share of them."""
    text = (NANO / "heldout.txt").read_text()
    ids = np.array(Tokenizer.load(NANO).encode(text))
    if len(ids) < 2 * tokens:
        sys.exit(f"nano's held-out text has {len(ids)} tokens, two prompts take {2 * tokens}.")
    first, at = ids[:tokens], int(tokens * shared)
    second = np.concatenate([first[:at], ids[tokens : 2 * tokens - at]])
    second[at] = (first[at] + 1) % 100 + 100
    return first, second


def read(session: Session, prompt: Any, cache: PrefixCache | None = None) -> tuple[float, Any]:
    """Return the seconds to a prompt's logits, and them; a cache is used as an engine loop does."""
    interval = cache.interval if cache else 512
    begin = time.perf_counter()
    at = cache.reuse(session, 0, prompt.tolist()) if cache else 0
    if cache is None:
        session.reset()
    logits = np.empty(0)
    while at < len(prompt):
        end = min((at // interval + 1) * interval, len(prompt))
        logits = session.prefill(prompt[None, at:end])
        at = end
        if cache and at < len(prompt):
            cache.store(session, 0)
    return time.perf_counter() - begin, logits


def measure(session: Session, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Time everything in turn, round by round, after one round that does not count."""
    first, second = prompts(arguments.tokens, arguments.shared)
    samples: dict[str, list[float]] = {name: [] for name in ("first", "kept", "whole", "memory", "folder")}
    worst = reused = nbytes = 0.0
    for turn in range(arguments.rounds + 1):
        print(f"round {turn} of {arguments.rounds}", end="\r", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        memory, disk = PrefixCache(), PrefixCache(folder)
        samples["first"].append(read(session, first)[0])
        session.reset()
        samples["kept"].append(read(session, first, disk)[0])
        disk.flush()
        session.reset()
        read(session, first, memory)
        seconds, expected = read(session, second)
        samples["whole"].append(seconds)
        for name in ("memory", "folder"):
            # The slot's own state would do as well: it is emptied first.
            session.reset()
            cache = memory if name == "memory" else PrefixCache(folder)
            before = cache.stats.tokens_reused
            seconds, logits = read(session, second, cache)
            samples[name].append(seconds)
            reused = cache.stats.tokens_reused - before
            worst = max(worst, float(np.abs(logits - expected).max()))
        nbytes = disk.stats.bytes
    middle = {name: statistics.median(values[1:]) * 1e3 for name, values in samples.items()}
    return dict(
        zip(
            COLUMNS,
            (
                arguments.tokens,
                int(arguments.tokens * arguments.shared),
                reused,
                middle["whole"],
                middle["memory"],
                middle["folder"],
                middle["whole"] / middle["memory"],
                middle["whole"] / middle["folder"],
                middle["first"],
                middle["kept"],
                nbytes / 1e6,
                worst,
            ),
            strict=True,
        )
    )


def append(path: Path, row: dict[str, float], threads: int) -> None:
    """Add the row to a CSV file."""
    fresh = not path.exists()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(["date", "threads", *(name.lower().replace(" ", "_") for name in COLUMNS)])
        writer.writerow([today, threads, *(f"{value:.6g}" for value in row.values())])


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the engine and the cache are, or will be made")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each prompt (4096)")
    parser.add_argument(
        "--shared", type=float, default=0.9, help="share of the first that the second has (0.9)"
    )
    parser.add_argument("--threads", type=int, default=available_cores(), help="threads (all cores)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not")
    parser.add_argument("--csv", type=Path, help="append the row to this file")
    arguments = parser.parse_args()
    engine = prepare(arguments.folder)
    session = Session(engine, NANO, options=OrtOptions(threads=arguments.threads))
    row = measure(session, arguments.folder / "cache", arguments)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    print("| " + " | ".join(COLUMNS[name].format(value) for name, value in row.items()) + " |")
    if arguments.csv:
        append(arguments.csv, row, arguments.threads)
    if row["difference"] > TOLERANCE:
        sys.exit(f"the logits differ by {row['difference']:.1e}, at most {TOLERANCE:.0e} was expected.")


if __name__ == "__main__":
    main()
