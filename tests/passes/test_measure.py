"""measure: shapes, bytes and launches of a graph equal those that the configuration gives."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from graphs import export_nano

from v4graph.config import ModelConfig
from v4graph.errors import EngineError
from v4graph.launch import PLANS
from v4graph.launch.calls import Chunk, head_calls, layer_calls
from v4graph.launch.cost import COSTS
from v4graph.launch.fused_calls import fused_layer_calls
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.measure import Step, measure
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph


@pytest.fixture(scope="module")
def traced_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_nano(tmp_path_factory.mktemp("bf16") / "graph", optimize=False) / "model.onnx"


@pytest.mark.parametrize("step", [Step(1, 1, 4000, 8192), Step(3, 5, 100, 1024)])
def test_layers_cost_what_their_calls_cost(traced_bf16: Path, step: Step) -> None:
    config = ModelConfig.load("nano")
    chunk = Chunk(step.batch, step.tokens, step.capacity)
    blocks = {block.name: block for block in measure(ir.load(traced_bf16), step)}
    for i, layer in enumerate(config.layers):
        calls = layer_calls(config, layer, chunk)
        block = blocks[f"layers.{i}"]
        assert [node.op for node in block.nodes] != []
        assert sorted(node.op for node in block.nodes) == sorted(call.op for call in calls)
        assert block.launches == sum(len(call.launches(PLANS).launches) for call in calls)
        costs = [COSTS[call.op].of(call, step.context) for call in calls]
        assert (block.bytes, block.flops) == tuple(map(sum, zip(*costs, strict=True)))
    head = [node for node in blocks["head"].nodes if node.custom]
    assert [node.op for node in head] == [call.op for call in head_calls(config, chunk)]


def test_inlined_layers_measure_the_same(traced_bf16: Path) -> None:
    whole, inlined = ir.load(traced_bf16), ir.load(traced_bf16)
    InlineLayers()(inlined)
    for one, other in zip(measure(whole, Step()), measure(inlined, Step()), strict=True):
        assert one.name == other.name
        assert (one.bytes, one.flops, one.launches) == (other.bytes, other.flops, other.launches)


def test_a_fused_op_moves_no_more_than_its_parts(traced_bf16: Path, tmp_path: Path) -> None:
    fused = export_nano(tmp_path / "graph") / "model.onnx"
    for one, other in zip(
        measure(ir.load(traced_bf16), Step()), measure(ir.load(fused), Step()), strict=True
    ):
        if one.name.startswith("layers."):
            assert other.bytes < one.bytes
            assert other.flops == one.flops


@pytest.mark.parametrize("name", ["nano", "flash", "pro"])
def test_an_optimised_graph_makes_these_calls(name: str, tmp_path: Path) -> None:
    """What the planner and the benchmarks count without a graph."""
    config, step = ModelConfig.load(name), Step(2, 3, 500, 1024)
    export_graph(resolve(name), tmp_path / "graph", ExportOptions(dtype="bfloat16"))
    blocks = {block.name: block for block in measure(ir.load(tmp_path / "graph" / "model.onnx"), step)}
    for i, layer in enumerate(config.layers):
        calls = fused_layer_calls(config, layer, Chunk(2, 3, 1024))
        nodes = blocks[f"layers.{i}"].nodes
        assert sorted(call.op for call in calls) == sorted(node.op for node in nodes)
        for call in calls:
            assert any(
                [tensor.shape for tensor in node.inputs] == call.shapes
                and node.attributes == pytest.approx(call.attributes)
                for node in nodes
                if node.op == call.op
            ), call


def test_a_dimension_that_no_call_has_is_named() -> None:
    text = '<ir_version: 10, opset_import: ["" : 24]> g (float[Q] x) => (float[Q] y) { y = Neg (x) }'
    with pytest.raises(EngineError, match="graph input 'x' has a dimension 'Q', expected B, S or C<ratio>"):
        measure(ir.from_onnx_text(text), Step())
