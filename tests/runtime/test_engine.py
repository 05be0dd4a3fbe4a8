import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from toy_engine import ToyWeights

from v4graph.errors import EngineError, ManifestError, SessionError, V4GraphError
from v4graph.manifest import Manifest
from v4graph_runtime import Session, TrtOptions


@pytest.fixture
def copied(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "engine"))


def change(folder: Path, **fields: Any) -> None:
    dataclasses.replace(Manifest.load(folder), **fields).save(folder)


CHANGES: list[tuple[dict[str, Any], str]] = [
    (
        {"backend": "xla"},
        r"built for backend 'xla', this runtime has ort, trt; build it again with `v4graph build",
    ),
    (
        {"backend": "trt"},
        r"the manifest does not say how model\.plan was built; .* `v4graph build GRAPH_DIR .* --backend trt`",
    ),
    ({"dtype": "bfloat16"}, r"a bfloat16 graph, .* export with --dtype fp32\."),
    ({"ops": {"V4MoE": 99}}, "made with op V4MoE version 99, this v4graph has version 1; export again"),
    ({"ops": {"V4Gone": 1}}, "made with op V4Gone version 1, this v4graph has no such op; export again"),
    ({"files": {}}, "the manifest records no model.onnx; build it again"),
    ({"files": {"model.onnx": "0"}}, r"model\.onnx was changed after it was built"),
]


@pytest.mark.parametrize(("fields", "message"), CHANGES)
def test_an_engine_that_does_not_match_is_refused(
    copied: Path, weights: ToyWeights, fields: dict[str, Any], message: str
) -> None:
    change(copied, **fields)
    with pytest.raises(EngineError, match=message):
        Session(copied, weights)


def test_options_of_another_backend_are_refused(engine: Path, weights: ToyWeights) -> None:
    with pytest.raises(
        SessionError, match=r"built for backend 'ort', which takes OrtOptions, not TrtOptions"
    ):
        Session(engine, weights, options=TrtOptions())


def test_known_ops_are_accepted(copied: Path, weights: ToyWeights) -> None:
    change(copied, ops={"V4MoE": 1})
    assert Session(copied, weights).position.tolist() == [0]


def test_a_missing_model_is_refused(copied: Path, weights: ToyWeights) -> None:
    (copied / "model.onnx").unlink()
    with pytest.raises(EngineError, match=r"model\.onnx is missing"):
        Session(copied, weights)


def test_a_graph_is_not_an_engine(copied: Path, weights: ToyWeights) -> None:
    change(copied, kind="graph")
    with pytest.raises(ManifestError, match="v4graph build"):
        Session(copied, weights)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, weights: ToyWeights) -> None:
    with pytest.raises(ManifestError, match="v4graph build"):
        Session(tmp_path / "nothing", weights)


def test_an_engine_without_weights_needs_a_checkpoint(engine: Path) -> None:
    with pytest.raises(EngineError, match="holds no weights; name their checkpoint with --checkpoint DIR"):
        Session(engine, None)


def test_an_engine_with_weights_takes_no_checkpoint(copied: Path, weights: ToyWeights) -> None:
    change(copied, embedded_weights=True)
    with pytest.raises(EngineError, match="embeds its weights; open it without a checkpoint"):
        Session(copied, weights)


def test_a_checkpoint_path_is_opened_and_checked(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    with pytest.raises(V4GraphError):
        Session(engine, tmp_path)


def test_inputs_that_manifest_and_graph_do_not_share_are_named(
    copied: Path, engine: Path, weights: ToyWeights
) -> None:
    manifest = Manifest.load(engine)
    change(copied, bindings=manifest.bindings[:1])
    with pytest.raises(EngineError, match=r"graph input 'head\.weight' is neither a state nor a weight"):
        Session(copied, weights)
    extra = dataclasses.replace(manifest.bindings[0], input="norm.weight")
    change(copied, bindings=(*manifest.bindings, extra))
    more = ToyWeights({**weights.arrays, "norm.weight": weights.arrays["embed.weight"]})
    with pytest.raises(EngineError, match=r"input 'norm\.weight', which the graph does not have"):
        Session(copied, more)
