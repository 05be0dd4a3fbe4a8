"""What the page is made of: figures at each context, equal layers once, states, and aligned ops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from graphs import export_nano

from v4graph.manifest import Manifest
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.measure import Step, measure
from v4graph.viewer import Subject, compare, describe, render
from v4graph.viewer.blocks import label


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_nano(tmp_path_factory.mktemp("viewer") / "traced", optimize=False)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_nano(tmp_path_factory.mktemp("viewer") / "short", optimize=False, layers=2)


def subject(folder: Path) -> Subject:
    return Subject(folder, Manifest.load(folder), ir.load(folder / "model.onnx"))


def graph_of(one: Subject) -> dict[str, Any]:
    report: dict[str, Any] = describe([one], 1, 1, 0)["graphs"][0]
    return report


def test_figures_are_those_of_measure_at_the_chosen_context(traced: Path) -> None:
    one = subject(traced)
    report = describe([one], batch=2, tokens=1, context=5000)
    assert report["contexts"][report["chosen"]] == 5000
    total = report["graphs"][0]["totals"][report["chosen"]]
    assert one.model is not None
    blocks = measure(one.model, Step(2, 1, 5000, 8192))
    assert total["bytes"] == sum(block.bytes for block in blocks)
    assert total["flops"] == sum(block.flops for block in blocks)
    assert total["nodes"] == sum(len(block.nodes) for block in blocks)


def test_caches_are_measured_large_enough_for_the_context(traced: Path) -> None:
    graph = graph_of(subject(traced))
    assert graph["capacities"][0] == 8192
    assert graph["capacities"][-1] == (1 << 20) + 128


def test_equal_layers_are_one_block_whether_functions_or_inlined(traced: Path) -> None:
    one = subject(traced)
    graph = graph_of(one)
    assert one.model is not None
    InlineLayers()(one.model)
    inlined = graph_of(one)
    assert ("hca_topk", "layers 1, 3") in [(group["kind"], group["label"]) for group in graph["groups"]]
    assert len(graph["layers"]) == len(inlined["layers"]) == 6
    assert len(graph["blocks"]) == len(inlined["blocks"]) == 5
    assert inlined["totals"] == graph["totals"]
    roles = [[node["role"] for node in block["nodes"]] for block in graph["blocks"]]
    assert [[node["role"] for node in block["nodes"]] for block in inlined["blocks"]] == roles


def test_inputs_say_what_they_are_and_ops_what_they_are_part_of(traced: Path) -> None:
    graph = graph_of(subject(traced))
    block = next(group["block"] for group in graph["groups"] if group["kind"] == "csa_topk")
    nodes = {(node["op"], node["role"]): node for node in graph["blocks"][block]["nodes"]}
    compress = nodes["V4Compress", "attn.compressor"]
    kinds = {tensor["name"]: tensor["kind"] for tensor in (*compress["inputs"], *compress["outputs"])}
    assert kinds["attn.compressor.ape"] == "weight"
    assert kinds["compressed"] == kinds["next_compressed"] == "state"
    assert kinds["freqs"] == "constant"
    assert kinds["start_pos"] == "input"
    assert compress["part"] == "compressor"
    assert nodes["V4Fp8Linear", "attn.indexer.wq_b"]["part"] == "indexer"
    assert nodes["V4Fp8Linear", "attn.wq_a"]["part"] == "projections"
    assert nodes["V4HyperPre", "hc_attn"]["part"] == "hyper-connections"


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "layer 3"),
        ([0, 1], "layers 0, 1"),
        ([3, 5, 7, 9, 41], "layers 3, 5, 7 … 41"),
        ([2, 3, 4, 5], "layers 2 to 5"),
    ],
)
def test_labels_are_short(layers: list[int], text: str) -> None:
    assert label([f"layers.{i}" for i in layers]) == text


def test_a_graph_against_itself_has_no_changes(traced: Path) -> None:
    graph = graph_of(subject(traced))
    assert {row[0] for group in compare(graph, graph) for row in group["rows"]} == {"same"}


def test_a_changed_attribute_is_named(traced: Path) -> None:
    before = graph_of(subject(traced))
    after = json.loads(json.dumps(before))
    group = next(group for group in after["groups"] if group["kind"] == "csa_topk")
    nodes = after["blocks"][group["block"]]["nodes"]
    index = next(i for i, node in enumerate(nodes) if node["op"] == "V4IndexTopK")
    nodes[index]["attributes"]["topk"] = 7
    old = before["blocks"][group["block"]]["nodes"][index]["attributes"]["topk"]
    changed = [row for g in compare(before, after) for row in g["rows"] if row[0] != "same"]
    assert changed == [["changed", index, index, [f"topk: {old} → 7"]]]


def test_layers_of_one_graph_only_are_added(traced: Path, short: Path) -> None:
    groups = compare(graph_of(subject(short)), graph_of(subject(traced)))
    added = [group for group in groups if group["before"] is None]
    assert sorted(name for group in added for name in group["layers"]) == ["layers.2", "layers.3"]
    assert {row[0] for group in added for row in group["rows"]} == {"added"}


def test_data_cannot_end_the_script_that_holds_it(traced: Path) -> None:
    report = describe([subject(traced)], 1, 1, 0)
    report["graphs"][0]["model"] = "</script><script>alert(1)</script>"
    assert "<script>alert(1)" not in render(report)
