"""TensorRT plans of Flash and Pro at full depth, from their configs alone, within the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import onnx
import pytest
from engines import REPO

from v4graph.manifest import Manifest

SECONDS, PEAK_BYTES, PLAN_BYTES = 60, 1_000_000_000, 50_000_000
COMMAND = """
import json, resource, sys, time
start = time.monotonic()
from v4graph.cli import main
main(sys.argv[2:], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
json.dump({"seconds": time.monotonic() - start, "peak": peak}, open(sys.argv[1], "w"))
"""


def run(figures: Path, *arguments: object) -> dict[str, float]:
    words = [sys.executable, "-c", COMMAND, figures, *arguments]
    subprocess.run([str(word) for word in words], check=True, cwd=REPO)
    return json.loads(figures.read_text())


@pytest.fixture(scope="module", params=["flash", "pro"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "graph"
    run(folder.parent / "export.json", "export", request.param, folder, "--numerics", "v4", "--dtype", "bf16")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm120", "sm89"])
def test_full_depth_plan(graph: Path, target: str, tmp_path: Path) -> None:
    lowered, engine = tmp_path / "lowered.onnx", tmp_path / "engine"
    options = ("--backend", "trt", "--target", target, "--lowered", lowered)
    figures = run(tmp_path / "figures.json", "build", graph, engine, *options)
    plan = (engine / "model.plan").read_bytes()
    print(f"\n{figures['seconds']:.1f} s, {figures['peak'] / 1e6:.0f} MB peak, {len(plan) / 1e6:.1f} MB plan")
    assert figures["seconds"] <= SECONDS
    assert figures["peak"] <= PEAK_BYTES
    assert len(plan) <= PLAN_BYTES
    record = Manifest.load(engine, "engine").tensorrt
    assert record is not None
    assert record.targets == (target,)
    model = onnx.load(lowered)
    assert not model.functions
    counts = Counter(node.op_type for node in model.graph.node if node.op_type.startswith("V4"))
    assert counts == {plugin.op: plugin.layers for plugin in record.plugins}
    assert all(name.encode() in plan for name in counts)
    layers = sum(len(where) for where in Manifest.load(graph).layer_functions.values())
    assert counts["V4MoE"] == layers
    assert counts["V4HyperPostPre"] == 2 * layers
    assert counts["V4HyperPost"] == 1  # the head ends what the last layer began
