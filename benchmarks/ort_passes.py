"""Milliseconds of a decoded token in onnxruntime, of several graphs in one interleaved run.

    python benchmarks/ort_passes.py CHECKPOINT GRAPH GRAPH ... [--csv benchmarks/ort_passes.csv]

Each graph directory decodes one token after 100 on two threads, in turn with the others; medians of 100.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import click
import numpy as np

from v4graph import ort
from v4graph.checkpoint import Checkpoint
from v4graph.manifest import Manifest

RUNS, CONTEXT = 100, 100


def opened(graph: Path, checkpoint: Checkpoint):  # type: ignore[no-untyped-def]
    """Return a session on a graph and its inputs."""
    manifest = Manifest.load(graph)
    feeds = dict(checkpoint.bound(manifest))
    feeds |= {"input_ids": np.array([[5]]), "start_pos": np.array([CONTEXT], np.int32)}
    feeds["num_tokens"] = np.array([1], np.int32)
    for state in manifest.states:
        shape = (1, state.rows(manifest.max_seq_len), int(state.shape[2]))
        feeds |= {
            state.name.replace("{i}", str(layer)): np.zeros(shape, np.float32) for layer in state.layers
        }
    module = ort.load()
    settings = module.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 2, 3
    return ort.open_session(module, graph / "model.onnx", settings, "cpu"), feeds


@click.command()
@click.argument("checkpoint")
@click.argument("graphs", nargs=-1, type=click.Path(path_type=Path, exists=True))
@click.option("--csv", "table", type=click.Path(path_type=Path), help="Append the rows here.")
def main(checkpoint: str, graphs: tuple[Path, ...], table: Path | None) -> None:
    """Time the graphs."""
    weights = Checkpoint.open(checkpoint)
    sessions = [(graph, *opened(graph, weights), []) for graph in graphs]
    for _ in range(RUNS):
        for _, session, feeds, times in sessions:
            started = time.perf_counter()
            session.run(["logits"], feeds)
            times.append(1e3 * (time.perf_counter() - started))
    first = np.median(sessions[0][3])
    rows = [
        [Path(checkpoint).name, graph.name, f"{np.median(times):.2f}", f"{first / np.median(times):.2f}"]
        for graph, _, _, times in sessions
    ]
    for row in rows:
        click.echo("  ".join(row))
    if table is not None:
        with table.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                writer.writerow(["checkpoint", "graph", "median_ms", "times_the_first"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()
