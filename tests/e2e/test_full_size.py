"""Flash and Pro from their configs alone: time, memory, size and contents of the graph directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
from engines import REPO

from v4graph.config import ModelConfig
from v4graph.inventory import inventory
from v4graph.manifest import Manifest

SECONDS = 60
PEAK_BYTES = 1_000_000_000
DIRECTORY_BYTES = 5_000_000

EXPORT = """
import json, resource, sys, time
start = time.monotonic()
from v4graph.cli import main
main(["export", sys.argv[1], sys.argv[2], "--numerics", "v4", "--dtype", "bf16"], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
json.dump({"seconds": time.monotonic() - start, "peak": peak}, open(sys.argv[3], "w"))
"""


def export(preset: str, folder: Path) -> tuple[Path, dict[str, float]]:
    """Export in a process of its own, with no compiled Python files and no cache of any kind."""
    # An empty prefix hides every .pyc of the environment: all imports compile, as on a first run.
    caches = {"PYTHONPYCACHEPREFIX": str(folder / "pycache"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment = {**os.environ, **caches}
    places = [REPO, *(REPO / tower for tower in ("export", "runtime", "plugins"))]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, places))
    arguments = [sys.executable, "-c", EXPORT, preset, str(folder / "graph"), str(folder / "figures.json")]
    subprocess.run(arguments, check=True, env=environment)
    return folder / "graph", json.loads((folder / "figures.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "layers", "tensors"), [("flash", 43, 69_187), ("pro", 61, 145_116)])
def test_full_size_export_from_config_alone(preset: str, layers: int, tensors: int, tmp_path: Path) -> None:
    graph, figures = export(preset, tmp_path)
    size = sum(path.stat().st_size for path in graph.iterdir())
    print(f"\n{preset}: {figures['seconds']:.1f} s, {figures['peak'] / 1e6:.0f} MB peak, {size / 1e3:.0f} kB")
    assert figures["seconds"] <= SECONDS
    assert figures["peak"] <= PEAK_BYTES
    assert size <= DIRECTORY_BYTES
    model = onnx.load(graph / "model.onnx")
    onnx.checker.check_model(model)
    calls = Counter(node.op_type for node in model.graph.node if node.op_type.startswith("V4Layer_"))
    assert calls.total() == layers
    manifest = Manifest.load(graph, "graph")
    assert calls == {name: len(where) for name, where in manifest.layer_functions.items()}
    inputs = {value.name for value in model.graph.input}
    assert {name for binding in manifest.bindings for name, _ in binding.inputs()} <= inputs
    bound = {
        name
        for binding in manifest.bindings
        for _, layer in binding.inputs()
        for name in (*binding.tensors(layer), *binding.scales(layer))
    }
    official = {tensor.name for tensor in inventory(ModelConfig.load(preset))}
    assert len(official) == tensors
    assert official - bound == {name for name in official if name.startswith("mtp.")}
    assert bound <= official
