"""`v4graph optimize`, `passes` and `inspect --launches` as a user runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from engines import NANO
from graphs import export_nano

from v4graph.manifest import Manifest

Cli = Callable[..., Result]
DEFAULT = (
    "DeduplicateInitializers",
    "RemoveUnusedNodes",
    "RemoveDeadStates",
    "DeferHyperPost",
    "FuseHyperPostPre",
    "FuseCsaProjections",
    "FuseHcaProjections",
    "FuseCsaQueryProjections",
    "FuseWindowProjections",
    "FuseQueryProjection",
    "FuseCsaPrep",
    "FuseHcaPrep",
    "RemoveUnusedFunctions",
)
MINE = '''"""Passes of a user."""
import onnx_ir as ir

class Scale(ir.passes.InPlacePass):
    """Changes the routing scale, wrongly."""
    def __repr__(self):
        return "Scale"
    def call(self, model):
        changed = False
        for function in model.functions.values():
            for node in function:
                if node.op_type == "V4RouteHash" and function.name.startswith("V4Layer"):
                    changed |= node.attributes["scale"].value != 3.0
                    node.attributes["scale"] = ir.AttrFloat32("scale", 3.0)
        return ir.passes.PassResult(model, modified=changed)
'''


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced") / "graph"
    return export_nano(folder, dtype="float32", optimize=False, max_seq_len=512)


def test_the_default_passes_make_what_export_makes(traced: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("optimize", traced, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert tuple(one["name"] for one in report["passes"]) == DEFAULT
    # One more than in bf16: the embeddings' cast.
    assert (report["passes"][0]["before"]["launches"], report["passes"][-1]["after"]["launches"]) == (114, 91)
    exported = export_nano(tmp_path / "exported", dtype="float32", max_seq_len=512)
    ours, theirs = Manifest.load(tmp_path / "out"), Manifest.load(exported)
    assert (ours.passes, ours.ops, ours.states) == (theirs.passes, theirs.ops, theirs.states)
    assert cli("optimize", tmp_path / "out", tmp_path / "again", "--dry-run").stdout.count(" -  ") >= len(
        DEFAULT
    )
    assert not (tmp_path / "again").exists()


def test_passes_are_chosen_dumped_and_listed(traced: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("--passes", "DeferHyperPost,FuseHyperPostPre", "--skip", "DeferHyperPost")
    result = cli("optimize", traced, tmp_path / "out", *arguments, "--dump-after", "all")
    assert result.exit_code == 0, result.output
    (dump,) = (tmp_path / "out.passes").iterdir()
    assert dump.name == "01-FuseHyperPostPre.onnx"
    onnx.checker.check_model(str(dump))
    assert Manifest.load(tmp_path / "out").passes == ("FuseHyperPostPre",)
    listed = json.loads(cli("passes", "--json").stdout)
    assert tuple(one["name"] for one in listed["default"]) == DEFAULT
    assert [one["name"] for one in listed["transforms"]] == ["layers=N", "last-logits"]
    assert "FuseHcaPrep" in cli("passes").stdout


def test_a_users_wrong_pass_is_stopped_by_the_check(traced: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    arguments = ("--pass-file", tmp_path / "mine.py", "--passes", "Scale")
    assert cli("optimize", traced, tmp_path / "unchecked", *arguments).exit_code == 0
    result = cli("optimize", traced, tmp_path / "out", *arguments, "--check")
    assert result.exit_code == 2
    assert "pass Scale changes the numbers: layers.0.ffn.gate/V4RouteHash" in result.output
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.check").iterdir())) == 1


def test_transforms_change_the_manifest_too(traced: Path, tmp_path: Path, cli: Cli) -> None:
    result = cli("optimize", traced, tmp_path / "out", "--transform", "layers=2", "--check")
    assert result.exit_code == 0, result.output
    assert "transform layers=2: 5 states equal, logits finite" in result.stdout
    manifest = Manifest.load(tmp_path / "out")
    assert sum(len(layers) for layers in manifest.layer_functions.values()) == 2
    assert manifest.config["num_hidden_layers"] == 2
    assert {layer for state in manifest.states for layer in state.layers} == {0, 1}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--passes", "FuseHcaPrp"), "unknown pass 'FuseHcaPrp'; did you mean 'FuseHcaPrep'?"),
        (("--skip", "Nothing"), "unknown pass 'Nothing'"),
        (("--dump-after", "DeferHyperPst"), "--dump-after DeferHyperPst: no such pass runs; did you mean"),
        (("--pass-file", "/nowhere.py"), "--pass-file /nowhere.py: no such file"),
        (("--pass-file", "{empty}"), "defines no passes; write a class derived from"),
        (("--pass-file", "{broken}"), "ZeroDivisionError"),
        (("--transform", "layer=2"), "there are layers, last-logits; did you mean 'layers'?"),
        (("--transform", "layers=0"), "expected layers=N with N at least 1"),
        (("--transform", "last-logits=3"), "expected last-logits"),
    ],
)
def test_bad_choices_are_said(
    traced: Path, tmp_path: Path, cli: Cli, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "empty.py").write_text('"""Nothing."""\n')
    (tmp_path / "broken.py").write_text("1 / 0\n")
    names = {"empty": tmp_path / "empty.py", "broken": tmp_path / "broken.py"}
    result = cli("optimize", traced, tmp_path / "out", *(text.format(**names) for text in arguments))
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_launches_are_shown_by_kind(traced: Path, cli: Cli) -> None:
    out = cli("inspect", traced, "--launches", "--context", 1000).stdout
    assert out.startswith("one decoded token after 1,000;")
    assert "csa_topk" in out
    report = json.loads(cli("inspect", traced, "--launches", "--json").stdout)
    kinds = {one["kind"]: one for one in report["kinds"]}
    assert (kinds["csa_topk"]["launches"], kinds["hca_topk"]["count"]) == (32, 2)
    assert report["total"]["launches"] == 114


def test_embedded_weights_go_along(tmp_path: Path, cli: Cli) -> None:
    options = {"dtype": "float32", "embed_weights": True, "optimize": False, "all_logits": True}
    graph = export_nano(tmp_path / "graph", max_seq_len=128, **options)
    chosen = ("--passes", "DeferHyperPost,FuseHyperPostPre", "--check")
    result = cli("optimize", graph, tmp_path / "out", *chosen)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("equal") == 2
    agreed = cli("verify", NANO, tmp_path / "out", "--tokens", 20)
    assert agreed.exit_code == 0, agreed.output
