"""StripPluginBodies and InlineLayers: text in, ops out, the same numbers, nothing left for a second run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from engines import NANO

from v4graph.checkpoint import Checkpoint
from v4graph.manifest import Manifest
from v4graph.passes.facts import KIND, LAYER, custom_nodes, where
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.pipeline import tensorrt
from v4graph.passes.strip_plugin_bodies import StripPluginBodies
from v4graph.source import resolve
from v4graph.verify.graph_runner import fed
from v4graph_export import ExportOptions, export_graph

TEXT = """<ir_version: 10, opset_import: ["" : 24, "v4graph" : 1]>
g (float[B,S,8] x, float[8] w) => (float[B,S,8] y) { y = v4graph.V4Layer_window_topk (x, w) }
<domain: "v4graph", opset_import: ["" : 24, "v4graph" : 1]>
V4Layer_window_topk (x, weight) => (y) { v0 = v4graph.V4RmsNorm__tag (x, weight)  y = Neg (v0) }
<domain: "v4graph", opset_import: ["" : 24, "v4graph" : 1]>
V4RmsNorm__tag (x, weight) => (y) { y = v4graph.V4Inner (x, weight) }
<domain: "v4graph", opset_import: ["" : 24]>
V4Inner (x, weight) => (y) { y = Mul (x, weight) }
"""


def model() -> ir.Model:
    return ir.from_onnx_text(TEXT)


def names(m: ir.Model) -> list[str]:
    return [function.name for function in m.functions.values()]


def test_stripping_removes_the_body_the_tag_and_what_only_the_body_called() -> None:
    m = model()
    assert StripPluginBodies({"V4RmsNorm"})(m).modified
    assert names(m) == ["V4Layer_window_topk"]
    assert [node.op_type for node in next(iter(m.functions.values()))] == ["V4RmsNorm", "Neg"]
    assert not StripPluginBodies({"V4RmsNorm"})(m).modified


def test_an_op_without_plugin_keeps_its_body_and_its_tag() -> None:
    m = model()
    assert not StripPluginBodies({"V4HyperPre"})(m).modified
    assert set(names(m)) == {"V4Layer_window_topk", "V4RmsNorm__tag", "V4Inner"}


def test_inlining_names_nodes_after_layer_and_weight() -> None:
    m = model()
    m.graph.inputs[1].name = "layers.0.q_norm.weight"
    m.graph.node(0).name = "layers.0"
    assert InlineLayers()(m).modified
    norm, negation = m.graph
    assert (norm.name, negation.name) == ("layers.0.q_norm/V4RmsNorm", "layers.0/Neg")
    assert norm.outputs[0].name == "layers.0.v0"
    assert (norm.metadata_props[LAYER], norm.metadata_props[KIND]) == ("layers.0", "window_topk")
    assert where(norm) == "layers.0.q_norm/V4RmsNorm (window_topk layer)"
    assert set(names(m)) == {"V4RmsNorm__tag", "V4Inner"}
    assert not InlineLayers()(m).modified


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano") / "graph"
    export_graph(resolve(str(NANO)), folder, ExportOptions(max_seq_len=128))
    return folder


def test_inlined_layers_give_the_same_logits(nano: Path) -> None:
    """Both graphs keep their bodies, so that onnxruntime runs them."""
    m = ir.load(nano / "model.onnx")
    for one in tensorrt(()):
        one(m)
    manifest = Manifest.load(nano)
    feeds: dict[str, np.ndarray] = dict(Checkpoint.open(NANO).bound(manifest))
    feeds |= {"input_ids": np.array([[5, 9, 300]]), "start_pos": np.zeros(1, np.int32)}
    feeds["num_tokens"] = np.full(1, 3, np.int32)
    for state in manifest.states:
        for layer in state.layers:
            shape = (1, state.rows(128), int(state.shape[2]))
            feeds[state.name.replace("{i}", str(layer))] = np.zeros(shape, np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    before, after = (
        onnxruntime.InferenceSession(data, options).run(["logits"], fed(feeds))[0]
        for data in ((nano / "model.onnx").read_bytes(), ir.to_proto(m).SerializeToString())
    )
    np.testing.assert_array_equal(before, after)


def test_every_custom_op_of_nano_is_found_and_named_once(nano: Path) -> None:
    m = ir.load(nano / "model.onnx")
    for one in tensorrt(()):
        one(m)
    found = [node.name for node, _ in custom_nodes(m)]
    assert len(found) == len(set(found)) == 44
