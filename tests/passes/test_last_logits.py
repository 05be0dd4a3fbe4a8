"""LastLogits: the head of a graph with all logits looks at one token per slot."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from graphs import export_nano

from v4graph.passes.defer_hyper_post import DeferHyperPost
from v4graph.passes.last_logits import LastLogits
from v4graph.verify.pass_check import copy
from v4graph.verify.transform_check import check_last_logits


@pytest.fixture(scope="module")
def all_logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all-logits") / "graph"
    return export_nano(folder, dtype="float32", optimize=False, all_logits=True, max_seq_len=128)


@pytest.mark.parametrize("deferred", [False, True])
def test_only_the_last_tokens_logits_are_left(all_logits: Path, deferred: bool) -> None:
    model = ir.load(all_logits / "model.onnx")
    if deferred:
        DeferHyperPost()(model)
    before = copy(model)
    assert LastLogits()(model).modified
    assert model.graph.outputs[0].shape == ir.Shape(["B", before.graph.outputs[0].shape[2]])
    onnx.checker.check_model(ir.to_proto(model))
    assert check_last_logits(before, model) == "equal to the last valid token's"
    assert not LastLogits()(model).modified
