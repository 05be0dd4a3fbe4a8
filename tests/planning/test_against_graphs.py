"""What the planner counts from a config is what exported graphs, real sessions and the cost of ops say."""

from __future__ import annotations

import math
from pathlib import Path

import onnx_ir as ir
import pytest
from engines import export_and_build

from v4graph.config import ModelConfig
from v4graph.config.types import OFFICIAL
from v4graph.launch.calls import Chunk, layer_calls
from v4graph.launch.cost import COSTS
from v4graph.manifest import Binding, Manifest
from v4graph.passes.measure import Step as GraphStep
from v4graph.passes.measure import measure
from v4graph.planning.cache import CacheFormat, state_bytes
from v4graph.planning.weights import resident
from v4graph.planning.work import Step, flops_by_part, work
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_runtime import Session
from v4graph_runtime.state import state_tensors

NANO = Path(__file__).parents[2] / "models" / "nano"
ITEMS = {"float32": 4, "bfloat16": 2, "int8": 1, "int64": 8}


@pytest.fixture(scope="module", params=["nano", "flash", "pro"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "graph"
    export_graph(resolve(request.param), folder, ExportOptions(dtype="bfloat16"))
    return request.param, folder


@pytest.mark.parametrize("step", [Step(1, 1, 8000), Step(1, 1, 300), Step(3, 2, 1000), Step(1, 2048, 0)])
def test_launches_and_bytes_are_those_of_the_exported_graph(graph: tuple[str, Path], step: Step) -> None:
    name, folder = graph
    blocks = measure(
        ir.load(folder / "model.onnx"), GraphStep(step.batch, step.tokens, step.context, step.chunk.capacity)
    )
    done = work(ModelConfig.load(name), step, CacheFormat())
    assert done.launches == sum(block.launches or 0 for block in blocks)
    custom = [node for block in blocks for node in block.nodes if node.custom]
    assert sum(done.ops.values()) == len(custom)
    assert done.bytes == sum(node.bytes for node in custom)


def _bytes(binding: Binding) -> int:
    return (len(binding.layers) or 1) * math.prod(binding.shape) * ITEMS[binding.dtype]


def test_resident_bytes_are_those_of_the_graphs_weight_inputs(graph: tuple[str, Path]) -> None:
    name, folder = graph
    found = resident(ModelConfig.load(name), OFFICIAL)
    bindings = Manifest.load(folder).bindings
    assert found.total == sum(map(_bytes, bindings))
    assert sum(found.experts) == sum(_bytes(binding) for binding in bindings if binding.experts)


def test_state_bytes_are_those_that_the_runtime_allocates_for_a_bf16_graph(graph: tuple[str, Path]) -> None:
    name, folder = graph
    manifest = Manifest.load(folder)
    planned = state_bytes(ModelConfig.load(name), CacheFormat(), manifest.max_seq_len)
    assert planned == sum(state.nbytes for state in state_tensors(manifest, 1))


@pytest.mark.parametrize("capacity", [128, 1024, 4096])
def test_state_bytes_are_those_of_a_session(tmp_path: Path, capacity: int) -> None:
    engine = export_and_build(tmp_path, NANO, ExportOptions(numerics="v4", max_seq_len=capacity))
    with Session(engine, NANO, batch=2) as session:
        planned = state_bytes(ModelConfig.load("nano"), CacheFormat("fp32", "fp32"), session.capacity)
        assert session.state_bytes == 2 * planned


@pytest.mark.parametrize(("context", "tokens"), [(0, 1), (0, 700), (7, 2100), (5000, 1), (1000, 129)])
@pytest.mark.parametrize("kind", ["window", "csa", "hca"])
def test_attention_is_charged_with_what_each_token_sees(kind: str, context: int, tokens: int) -> None:
    config = ModelConfig.load("flash")
    layer = next(layer for layer in config.layers if layer.attention == kind)
    ends = range(context + 1, context + tokens + 1)
    near = sum(min(config.sliding_window, t) for t in ends)
    far = {
        "window": 0,
        "csa": sum(min(config.index_topk, t // 4) for t in ends),
        "hca": sum(t // 128 for t in ends),
    }[kind]
    for call in layer_calls(config, layer, Chunk(2, tokens, 128 * 100)):
        flops = COSTS[call.op].of(call, context)[1]
        if call.op == "V4IndexTopK":
            assert flops == 2 * 2 * sum(t // 4 for t in ends) * 64 * 128
        elif call.op.endswith("Attention"):
            assert flops == 2 * 4 * 64 * 512 * (near + far)


def test_a_prompt_costs_what_its_tokens_cost_one_by_one() -> None:
    config = ModelConfig.load("nano")
    whole, equivalents = flops_by_part(config, Step(1, 400, 0), CacheFormat())
    steps = [flops_by_part(config, Step(1, 1, t), CacheFormat()) for t in range(400)]
    # The head runs once per call.
    once = flops_by_part(config, Step(1, 1, 0), CacheFormat())[0]["linear"]
    assert once > 0
    for part in ("attention", "indexer", "experts"):
        assert whole[part] == sum(flops[part] for flops, _ in steps)
    assert equivalents < sum(weighted for _, weighted in steps)
