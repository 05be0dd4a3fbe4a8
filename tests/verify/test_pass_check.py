"""The check of passes: right ones are equal, a planted wrong one is named with its node and inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import export_nano

from v4graph.errors import PassError
from v4graph.passes import pipeline
from v4graph.passes.gather_experts import GatherExperts
from v4graph.passes.measure import Step
from v4graph.passes.run import run_passes
from v4graph.source import resolve
from v4graph.verify.pass_check import PassChecker
from v4graph_export import ExportOptions, export_graph

Edit = Callable[[ir.Node], None]


class Planted(ir.passes.InPlacePass):
    """Changes the first call of an op in the layers, and claims to have optimised."""

    def __init__(self, op: str, edit: Edit) -> None:
        super().__init__()
        self.op, self.edit = op, edit

    def __repr__(self) -> str:
        return "Planted"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        layers = [f for f in model.functions.values() if f.name.startswith("V4Layer_")]
        node = next(n for f in layers for n in f if n.op_type.partition("__")[0] == self.op)
        self.edit(node)
        return ir.passes.PassResult(model, modified=True)


def checked(path: Path, folder: Path, passes: Sequence[ir.passes.PassBase]) -> dict[str, str]:
    model = ir.load(path / "model.onnx")
    checker = PassChecker(model, folder)
    run_passes(model, passes, Step(), checker.watch, checker.done)
    return checker.checked


@pytest.fixture(scope="module", params=["v4-float32", "v4-bfloat16", "exact-float32"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    numerics, dtype = request.param.split("-")
    folder = tmp_path_factory.mktemp("graph") / "graph"
    return export_nano(folder, numerics=numerics, dtype=dtype, optimize=False, max_seq_len=512)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "graph"
    return export_nano(folder, dtype="float32", optimize=False, max_seq_len=512)


def test_every_default_pass_is_equal(graph: Path, tmp_path: Path) -> None:
    found = checked(graph, tmp_path, pipeline.DEFAULT)
    assert set(found.values()) == {"equal", "nothing changed"}
    assert list(found.values()).count("equal") >= 3


def test_the_optional_passes_are_equal(plain: Path, tmp_path: Path) -> None:
    found = checked(plain, tmp_path, [one for one in pipeline.OPTIONAL if repr(one) == "InlineLayers"])
    assert found == {"InlineLayers": "equal"}


def test_gathered_experts_give_a_single_token_the_same_and_more_tokens_exactly(tmp_path: Path) -> None:
    graph = export_nano(
        tmp_path / "graph", numerics="exact", dtype="float32", optimize=False, max_seq_len=512
    )
    one = GatherExperts()
    found = checked(graph, tmp_path, (one,))["GatherExperts"]
    assert found.startswith("within "), found
    assert float(found.split()[1]) < 1e-4
    model = ir.load(graph / "model.onnx")
    assert one(model).modified
    assert not one(model).modified


def test_gathered_experts_leave_quantised_ones_alone(plain: Path) -> None:
    assert not GatherExperts()(ir.load(plain / "model.onnx")).modified


def scaled(name: str, value: float) -> Edit:
    def edit(node: ir.Node) -> None:
        node.attributes[name] = ir.AttrFloat32(name, value)

    return edit


def swapped(node: ir.Node) -> None:
    """The two inputs of a compressor's call that have one shape."""
    first, second = node.inputs[0], node.inputs[1]
    node.replace_input_with(0, second)
    node.replace_input_with(1, first)


@pytest.mark.parametrize(
    ("op", "edit", "place"),
    [
        ("V4RouteTopK", scaled("scale", 1.7), "layers.1.ffn.gate/V4RouteTopK"),
        ("V4RmsNorm", scaled("eps", 0.5), "layers.0.attn.q_norm/V4RmsNorm"),
        ("V4MoE", scaled("limit", 0.01), "layers.0.ffn.experts.w1/V4MoE"),
        ("V4Compress", swapped, "layers.1.attn.compressor/V4Compress"),
    ],
)
def test_a_wrong_pass_is_named_with_its_node(
    plain: Path, tmp_path: Path, op: str, edit: Edit, place: str
) -> None:
    with pytest.raises(PassError, match=f"^pass Planted changes the numbers: {place} gives ") as found:
        checked(plain, tmp_path, (Planted(op, edit),))
    saved = tmp_path / f"Planted-{place.replace('/', '.')}.npz"
    assert str(saved) in str(found.value)
    assert len(np.load(saved).files) >= 2


def test_a_pass_that_fails_or_drops_the_logits_is_named(plain: Path, tmp_path: Path) -> None:
    def fail(_node: ir.Node) -> None:
        raise ValueError("no such thing")

    with pytest.raises(PassError, match=r"pass Planted failed: .*no such thing"):
        checked(plain, tmp_path, (Planted("V4MoE", fail),))


@pytest.mark.slow
def test_every_default_pass_is_equal_at_flash_width(tmp_path: Path) -> None:
    """One layer of each kind, full widths, few experts and a small vocabulary."""
    source = resolve("flash")
    raw = {**source.config.raw, "vocab_size": 1024, "n_routed_experts": 8}
    path = tmp_path / "config.json"
    import json

    path.write_text(json.dumps(raw))
    export_graph(resolve(str(path)), tmp_path / "graph", ExportOptions(optimize=False, layers=5))
    found = checked(tmp_path / "graph", tmp_path, pipeline.DEFAULT)
    assert set(found.values()) == {"equal", "nothing changed"}
