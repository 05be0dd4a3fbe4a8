"""Opening and decoding a large checkpoint: two Flash layers with all 256 experts, 12.8 GB packed.

    python benchmarks/large_checkpoint.py build/large --csv benchmarks/large_checkpoint.csv

Makes the checkpoint (`v4graph init flash DIR --layers 2`, then `v4graph pack`: two minutes, and 26 GB of disk
while both are there) and its engine where they are missing. Then a process of its own opens a Session and
decodes. Weights are used where they lie in the page cache, so opening takes seconds, not the time to read
12.8 GB, and anonymous memory (RssAnon: what no file backs) stays small whatever the model's size. Both have
limits here. The first process starts without the weights in the page cache, the others find them there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

OPEN_SECONDS, ANONYMOUS_BYTES = 5.0, 1_000_000_000
COLUMNS = ["date", "start", "threads", "open_s", "first_token_ms", "decode_ms", "anon_imports_mb"]
COLUMNS += ["anon_open_mb", "anon_peak_mb", "file_peak_mb", "state_mb"]


class Resident:
    """Anonymous and file-backed resident bytes of this process, and their peaks, polled."""

    def __init__(self, period: float = 0.003) -> None:
        self.peak = {"RssAnon": 0, "RssFile": 0}
        self._period, self._stop = period, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def read(self) -> dict[str, int]:
        """Return the bytes now, and keep them if they are a peak."""
        text = Path("/proc/self/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in text.splitlines())
        found = {name: int(fields[name].split()[0]) * 1024 for name in self.peak}
        self.peak = {name: max(found[name], self.peak[name]) for name in found}
        return found

    def _poll(self) -> None:
        while not self._stop.wait(self._period):
            self.read()


def measure(engine: Path, checkpoint: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Open a session and decode; runs in a process of its own."""
    from v4graph_runtime import Session
    from v4graph_runtime.ort_backend import OrtOptions

    with Resident() as resident:
        imports = resident.read()["RssAnon"]
        begin = time.perf_counter()
        session = Session(engine, checkpoint, options=OrtOptions(threads=threads))
        opened = time.perf_counter() - begin
        after = resident.read()["RssAnon"]
        times = []
        for token in range(tokens):
            begin = time.perf_counter()
            session.decode([100 + 7 * token])
            times.append(time.perf_counter() - begin)
        resident.read()
        return {
            "open_s": opened,
            "first_token_ms": times[0] * 1e3,
            "decode_ms": statistics.median(times) * 1e3,
            "anon_imports_mb": imports / 1e6,
            "anon_open_mb": after / 1e6,
            "anon_peak_mb": resident.peak["RssAnon"] / 1e6,
            "file_peak_mb": resident.peak["RssFile"] / 1e6,
            "state_mb": session.state_bytes / 1e6,
        }


def prepare(folder: Path, checkpoint: Path) -> Path:
    """Make checkpoint and engine where they are missing; return the engine."""
    cli = [sys.executable, "-m", "v4graph.cli"]
    if not checkpoint.is_dir():
        plain = folder / "plain"
        subprocess.run([*cli, "init", "flash", plain, "--layers", "2"], check=True)
        subprocess.run([*cli, "pack", plain, checkpoint], check=True)
        shutil.rmtree(plain)
    engine, graph = folder / "engine", folder / "graph"
    if not engine.is_dir():
        subprocess.run([*cli, "export", checkpoint, graph, "--numerics", "v4"], check=True)
        subprocess.run([*cli, "build", graph, engine, "--backend", "ort"], check=True)
    return engine


def drop_from_cache(checkpoint: Path) -> None:
    """Ask the kernel to forget the weights' pages."""
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    """Run the table; 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where checkpoint and engine are, or will be made")
    parser.add_argument(
        "--checkpoint", type=Path, help="a packed checkpoint; left out, one is made in FOLDER"
    )
    parser.add_argument("--threads", type=int, default=0, help="threads (all cores)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded (16)")
    parser.add_argument("--runs", type=int, default=3, help="processes in turn, the first one cold (3)")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint or arguments.folder / "packed"
    if arguments.checkpoint and not checkpoint.is_dir():
        parser.error(
            f"--checkpoint {checkpoint}: no such directory; leave it out, and one is made in FOLDER."
        )
    if arguments.child:
        numbers = measure(arguments.folder / "engine", checkpoint, arguments.tokens, arguments.threads)
        print(json.dumps(numbers))
        return 0
    prepare(arguments.folder, checkpoint)
    rows = []
    for run in range(arguments.runs):
        if run == 0:
            drop_from_cache(checkpoint)
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(
            {"start": "warm" if run else "cold", "threads": arguments.threads, **json.loads(done.stdout)}
        )
        show(rows[-1], header=run == 0)
    if arguments.csv:
        append(arguments.csv, rows)
    return report(rows)


def show(row: dict[str, Any], header: bool) -> None:
    """Print one line of the table."""
    if header:
        print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
    print("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def report(rows: list[dict[str, Any]]) -> int:
    """Say whether every run kept the limits."""
    slowest, most = max(row["open_s"] for row in rows), max(row["anon_peak_mb"] for row in rows) * 1e6
    good = slowest < OPEN_SECONDS and most < ANONYMOUS_BYTES
    print(
        f"\nopened in at most {slowest:.2f} s (limit {OPEN_SECONDS:.0f} s), anonymous memory at most "
        f"{most / 1e6:.0f} MB (limit {ANONYMOUS_BYTES / 1e6:.0f} MB): {'kept' if good else 'EXCEEDED'}"
    )
    return 0 if good else 1


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add the rows to a CSV file."""
    fresh = not path.exists()
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([today, *(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())])


if __name__ == "__main__":
    sys.exit(main())
