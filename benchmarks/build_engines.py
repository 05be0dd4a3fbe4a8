"""Time, memory and size of TensorRT engines built from configs alone, each in a process of its own.

    python benchmarks/build_engines.py [--csv benchmarks/build_engines.csv]

Writes one row per model and target: seconds and peak RSS of `v4graph build`, plan bytes, network layers,
plugin layers. Needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
MODELS = {"nano": REPO / "models" / "nano", "flash": "flash", "pro": "pro"}
TARGETS = ("sm120", "sm89", "portable")
# The child reports its own peak: that of waited-for children is the largest of all so far.
CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from v4graph.cli import main
main(sys.argv[2:], standalone_mode=False)
figures = {"seconds": round(time.perf_counter() - start, 1),
           "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)}
open(sys.argv[1], "w").write(json.dumps(figures))
"""
FIELDS = (
    "date", "tensorrt", "model", "target", "seconds", "peak_rss_mb", "plan_mb", "layers", "plugin_layers"
)  # fmt: skip


def command(figures: Path, *arguments: object) -> dict[str, float]:
    """Run one v4graph command in a process of its own and return what it took."""
    words = [sys.executable, "-c", CHILD, figures, *arguments]
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
    return json.loads(figures.read_text())


def measure(model: str, target: str, folder: Path) -> dict[str, object]:
    """Build one engine and return its row."""
    graph, engine = folder / f"{model}.graph", folder / f"{model}.{target}"
    if not graph.exists():
        command(folder / "export.json", "export", MODELS[model], graph, "--numerics", "v4", "--dtype", "bf16")
    figures = command(folder / "build.json", "build", graph, engine, "--backend", "trt", "--target", target)
    record = json.loads((engine / "manifest.json").read_text())["tensorrt"]
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "tensorrt": f"{record['package']} {record['version']}",
        "model": model,
        "target": target,
        **figures,
        "plan_mb": round((engine / "model.plan").stat().st_size / 1e6, 1),
        "layers": record["layers"],
        "plugin_layers": sum(plugin["layers"] for plugin in record["plugins"]),
    }


def main() -> None:
    """Print the table, and append it to a CSV file if one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    rows = []
    print("  ".join(f"{field:>13}" for field in FIELDS[2:]))
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for target in TARGETS:
                row = measure(model, target, Path(folder))
                rows.append(row)
                print("  ".join(f"{row[field]!s:>13}" for field in FIELDS[2:]), flush=True)
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
