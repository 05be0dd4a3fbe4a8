"""Build errors are ours: they name node, layer kind and fix; TensorRT's words come below, never alone."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from graphs import change, graph_input, unchanged

from v4graph.errors import EngineError, V4GraphError
from v4graph.gpu import Gpu
from v4graph.manifest import Manifest
from v4graph.trt import TensorRT
from v4graph_plugins import build as build_module
from v4graph_plugins.build import BuildOptions, build_engine, choose_targets
from v4graph_plugins.plan import PlanOptions
from v4graph_plugins.profiles import Limits


def failure(graph: Path, folder: Path, *targets: str, **options: object) -> V4GraphError:
    settings = BuildOptions(targets=targets or ("sm120",), **options)  # type: ignore[arg-type]
    with pytest.raises(V4GraphError) as caught:
        build_engine(graph, folder / "engine", settings, lambda *_: None)
    assert not (folder / "engine").exists()
    assert not list(folder.glob(".engine*"))
    return caught.value


def retype(name: str, dtype: int):  # type: ignore[no-untyped-def]
    def edit(model: onnx.ModelProto) -> None:
        graph_input(model, name).type.tensor_type.elem_type = dtype

    return edit


def test_wrong_dtype_of_a_weight(nano_graph: Path, tmp_path: Path) -> None:
    edit = retype("layers.2.attn.wq_a.scale", onnx.TensorProto.BFLOAT16)
    error = failure(change(nano_graph, tmp_path / "graph", edit), tmp_path)
    assert str(error) == (
        "layers.2.attn.wq_a/V4Fp8Linear (csa_topk layer): input 'scale' is layers.2.attn.wq_a.scale of "
        "type bfloat16, "
        "expected int8 or float32; export it again with `v4graph export`."
    )


def test_wrong_dtype_that_only_the_plugin_sees(nano_graph: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        """Put a cast, whose type only TensorRT knows, before an attention input."""
        layer = next(f for f in model.functions if f.name == "V4Layer_csa_topk")
        node = next(n for n in layer.node if n.op_type.startswith("V4Compress__"))
        cast = onnx.helper.make_node("Cast", [node.input[0]], ["narrow"], to=onnx.TensorProto.BFLOAT16)
        node.input[0] = "narrow"
        layer.node.insert(list(layer.node).index(node), cast)

    error = failure(change(nano_graph, tmp_path / "graph", edit), tmp_path)
    sentence, *said = str(error).splitlines()
    assert sentence == (
        "layers.2.attn.compressor/V4Compress (csa_topk layer): input 'kv' is bfloat16, expected float32; "
        "export the "
        "graph again with `v4graph export`."
    )
    assert said[0].startswith("TensorRT: ")


def test_wrong_shape_of_a_weight(nano_graph: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        shape = graph_input(model, "layers.1.attn.wkv.weight").type.tensor_type.shape
        shape.dim[1].dim_value = 128

    error = failure(change(nano_graph, tmp_path / "graph", edit), tmp_path)
    assert str(error).startswith(
        "layers.1.attn.wkv/V4Fp8Linear (hca_topk layer): input 'weight' has shape [512, 128], expected "
        "[O, K] with "
        "O = 512 (weight), K = 256 (x); export the graph again with `v4graph export`."
    )
    assert error.detail


def test_op_version_that_the_plugins_do_not_have(nano_graph: Path, tmp_path: Path) -> None:
    ops = {**Manifest.load(nano_graph).ops, "V4Compress": 7}
    error = failure(change(nano_graph, tmp_path / "graph", unchanged, ops=ops), tmp_path)
    assert str(error) == (
        "layers.1.attn.compressor/V4Compress (hca_topk layer): needs V4Compress version 7, the plugin "
        "library has "
        "version 1; upgrade v4graph, or leave the op to its body with --no-plugin V4Compress."
    )


def test_op_that_nobody_knows(nano_graph: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        layer = next(f for f in model.functions if f.name == "V4Layer_hca_topk")
        node = next(n for n in layer.node if n.op_type == "V4RmsNorm")
        node.op_type = "V4LayerNorm"

    error = failure(change(nano_graph, tmp_path / "graph", edit), tmp_path)
    assert "/V4LayerNorm (hca_topk layer): this v4graph has no op V4LayerNorm" in str(error)


@pytest.mark.parametrize(
    ("target", "title"), [("sm80", "Ampere (A100)"), ("portable", "every GPU since Ampere")]
)
def test_native_fp8_where_tensor_cores_do_not_read_it(
    nano_graph: Path, tmp_path: Path, target: str, title: str
) -> None:
    def edit(model: onnx.ModelProto) -> None:
        helper = onnx.helper
        fp8 = onnx.TensorProto.FLOAT8E4M3FN
        model.graph.input.append(helper.make_tensor_value_info("extra.weight", fp8, [16, 16]))

    graph = change(nano_graph, tmp_path / "graph", edit)
    assert str(failure(graph, tmp_path, target)) == (
        f"--target {target}: tensor 'extra.weight' is native FP8, which {title} cannot hold; build for "
        "sm89, sm90, "
        "sm100, sm103, sm110, sm120, sm121, or export with INT8 carriers (the default of `v4graph "
        "export`), which "
        "build for every target."
    )


def test_shape_outside_the_profile(nano_graph: Path, tmp_path: Path) -> None:
    error = failure(nano_graph, tmp_path, limits=Limits(input_len=9000))
    assert str(error) == (
        "--max-input-len 9000 is outside the profile: the caches hold 8192 tokens; lower it to 8192 or raise "
        "--max-seq-len."
    )


def test_state_that_is_not_the_manifests(nano_graph: Path, tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        shape = graph_input(model, "state.0.window").type.tensor_type.shape
        shape.dim[1].dim_value = 64

    assert str(failure(change(nano_graph, tmp_path / "graph", edit), tmp_path)) == (
        "layers.0.attn/V4WindowAttention (window_hash layer): state 'state.0.window' has shape ['B', 64, "
        "512], the "
        "manifest says ['B', 136, 512]; export it again with `v4graph export`."
    )


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("sm90", "--target sm90: TensorRT for RTX does not build for it; choose among portable, sm80, "),
        ("sm75", "--target sm75: its builder crashes for Turing, which has no bf16 either; choose "),
        ("sm88", "--target sm88: no such target; did you mean 'sm89'?; known are portable, sm75, "),
    ],
)
def test_target_that_cannot_be_built(nano_graph: Path, tmp_path: Path, target: str, text: str) -> None:
    assert str(failure(nano_graph, tmp_path, target)).startswith(text)


def test_portable_stands_alone(nano_graph: Path, tmp_path: Path) -> None:
    assert "portable stands alone" in str(failure(nano_graph, tmp_path, "portable", "sm89"))


def test_target_that_the_kernel_bundle_lacks(nano_graph: Path, tmp_path: Path) -> None:
    index = {
        "format": 1,
        "ptx_isa": "9.0",
        "kernels": {},
        "targets": {"sm89": {"files": {}}, "sm120": {"files": {}}},
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert str(failure(nano_graph, tmp_path, "sm86", bundle=tmp_path)) == (
        "--target sm86: the kernel bundle has sm89, sm120; choose among these, or compile the kernels for "
        "it with "
        "`v4graph kernels build sm86`."
    )


def test_a_damaged_bundle_is_named(nano_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    assert str(failure(nano_graph, tmp_path, "sm86", bundle=tmp_path)) == (
        f"{tmp_path / 'index.json'}: not an index of kernels (format 1 expected); compile them again with "
        "`v4graph kernels build`."
    )


def test_full_tensorrt_builds_for_the_local_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    full = TensorRT(None, "tensorrt", "11.4.0", "as asked")
    with pytest.raises(
        EngineError, match="this machine has none; build there, or here for another GPU with TensorRT for"
    ):
        choose_targets(full, ())
    monkeypatch.setattr(build_module, "gpus", lambda: (Gpu("H200", "sm90", 1),))
    assert choose_targets(full, ()) == ("sm90",)
    assert choose_targets(full, ("portable",)) == ("portable",)
    with pytest.raises(
        EngineError, match="builds for the GPU in the machine only; choose among portable, sm90"
    ):
        choose_targets(full, ("sm89",))


def test_weight_streaming_without_weights(nano_graph: Path, tmp_path: Path) -> None:
    error = failure(nano_graph, tmp_path, plan=PlanOptions(weight_streaming=True))
    assert "--weight-streaming has nothing to stream" in str(error)


def test_plugin_that_does_not_exist(nano_graph: Path, tmp_path: Path) -> None:
    error = failure(nano_graph, tmp_path, without_plugin=("V4HyperPer",))
    assert str(error) == "--no-plugin V4HyperPer: no such plugin; did you mean 'V4HyperPre'?."


def test_body_that_tensorrt_cannot_parse(nano_graph: Path, tmp_path: Path) -> None:
    sentence, *said = str(failure(nano_graph, tmp_path, without_plugin=("V4MoE",))).splitlines()
    assert "cannot parse node layers.0.ffn.experts.w1/V4MoE (window_hash layer)" in sentence
    assert "do not leave it out with --no-plugin" in sentence
    assert said[0].startswith("TensorRT: ")


def test_body_that_tensorrt_cannot_build(nano_graph: Path, tmp_path: Path) -> None:
    sentence, *said = str(failure(nano_graph, tmp_path, without_plugin=("V4Compress",))).splitlines()
    assert sentence.endswith("the bodies of V4Compress run as native layers: give them back their plugins.")
    assert "FP8" in said[0]


def test_lowered_graph_that_cannot_be_written(nano_graph: Path, tmp_path: Path) -> None:
    error = failure(nano_graph, tmp_path, lowered=tmp_path / "missing" / "lowered.onnx")
    assert str(error).endswith("(No such file or directory); name a file in a folder that exists.")


def test_changed_graph(nano_graph: Path, tmp_path: Path) -> None:
    import shutil

    graph = tmp_path / "graph"
    shutil.copytree(nano_graph, graph)
    (graph / "model.onnx").write_bytes(b"no model")
    assert "model.onnx was changed after it was exported" in str(failure(graph, tmp_path))


def test_directory_in_use(nano_graph: Path, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "notes").touch()
    with pytest.raises(EngineError, match="exists and is not empty"):
        build_engine(nano_graph, tmp_path / "engine", BuildOptions(targets=("sm120",)), lambda *_: None)
