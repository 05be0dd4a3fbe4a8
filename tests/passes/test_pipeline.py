"""The default pipeline: the launch budget, what each pass leaves, and that a second run changes nothing.

`UPDATE_GOLDEN=1 pytest tests/passes/test_pipeline.py` writes tests/golden/launches.txt again.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from graphs import export_nano

from v4graph.passes import pipeline
from v4graph.passes.measure import Block, Step, measure
from v4graph.passes.run import apply, name_of, run_passes, summary_of
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph

GOLDEN = Path(__file__).parents[1] / "golden" / "launches.txt"
MODELS = ("nano", "flash", "pro")


@pytest.fixture(scope="module", params=MODELS)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "graph"
    options = ExportOptions(dtype="bfloat16", optimize=False)
    export_graph(resolve(request.param), folder, options)
    return request.param, folder / "model.onnx"


def optimized(path: Path) -> ir.Model:
    model = ir.load(path)
    for one in pipeline.DEFAULT:
        apply(one, model)
    return model


def layers(blocks: list[Block]) -> list[Block]:
    return [block for block in blocks if block.name.startswith("layers.")]


def test_a_decoded_token_stays_within_the_launch_budget(traced: tuple[str, Path]) -> None:
    for block in layers(measure(optimized(traced[1]), Step(context=8000))):
        limit = 20 if block.kind.startswith("csa") else 16
        assert block.launches is not None
        assert block.launches <= limit, (block.name, block.kind)


def listing(path: Path) -> str:
    """Launches per kind before and after, and the ops of each kind after."""
    before, after = (measure(model, Step(context=8000)) for model in (ir.load(path), optimized(path)))
    lines = []
    for kind in dict.fromkeys(block.kind for block in before):
        old, new = (next(b for b in blocks if b.kind == kind) for blocks in (before, after))
        ops = " ".join(f"{node.op}:{node.launches}" for node in new.nodes if node.custom)
        lines.append(
            f"  {kind}: {old.launches} -> {new.launches} launches, {len(old.nodes)} -> {len(new.nodes)} nodes"
        )
        lines += [f"    {ops}"] if ops else []
    totals = [sum(block.launches or 0 for block in blocks) for blocks in (before, after)]
    return "\n".join([f"  model: {totals[0]} -> {totals[1]} launches", *lines])


def test_launches_are_those_of_the_golden_file(traced: tuple[str, Path]) -> None:
    name, path = traced
    golden = dict(part.split("\n", 1) for part in GOLDEN.read_text().split("\n\n")) if GOLDEN.exists() else {}
    text = listing(path)
    if os.environ.get("UPDATE_GOLDEN"):
        golden[f"{name}:"] = text
        order = [f"{one}:" for one in MODELS if f"{one}:" in golden]
        GOLDEN.write_text("\n\n".join(f"{one}\n{golden[one].strip(chr(10))}" for one in order) + "\n")
        return
    assert text.strip() == golden[f"{name}:"].strip()


def test_a_second_run_changes_nothing(traced: tuple[str, Path]) -> None:
    model = optimized(traced[1])
    assert [name_of(one) for one in pipeline.DEFAULT if apply(one, model)] == []


def test_the_pipeline_takes_seconds_and_little_memory(traced: tuple[str, Path]) -> None:
    """Pro too: far below its 20 s and 2 GB, or the machine is busy."""
    started = time.process_time()
    run_passes(ir.load(traced[1]), pipeline.DEFAULT, Step())
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20


def test_a_graph_without_csa_layers_carries_no_indexer_state(tmp_path: Path) -> None:
    graph = export_nano(tmp_path / "graph", layers=2)
    names = [str(value.name) for value in ir.load(graph / "model.onnx").graph.inputs]
    assert names
    assert not [name for name in names if "index" in name]


def test_rope_frequencies_are_shared(nano_model: Callable[[], ir.Model]) -> None:
    assert sorted(nano_model().graph.initializers) == ["rope.compress.freqs", "rope.main.freqs"]


def test_every_pass_has_a_name_and_a_line() -> None:
    names = [name_of(one) for one in (*pipeline.DEFAULT, *pipeline.OPTIONAL)]
    assert len(set(names)) == len(names)
    lines = {name_of(one): summary_of(one) for one in (*pipeline.DEFAULT, *pipeline.OPTIONAL)}
    assert [name for name, line in lines.items() if not 10 < len(line) < 130] == []
