"""Plans of nano for every kind of target, and what they hold; no GPU is needed to build one."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from v4graph.errors import EngineError
from v4graph.manifest import Manifest, Profile
from v4graph_plugins import plugin as plugin_module
from v4graph_plugins.build import BuildOptions, Built, build_engine
from v4graph_plugins.catalogue import plugin_hashes
from v4graph_plugins.kernel_files import KernelFiles
from v4graph_plugins.lowering import lower
from v4graph_plugins.plan import PlanOptions
from v4graph_plugins.profiles import Limits


def quiet(_stage: str, _done: int, _total: int) -> None:
    return


def build(graph: Path, engine: Path, *targets: str, **options: object) -> Built:
    return build_engine(graph, engine, BuildOptions(targets=targets, **options), quiet)  # type: ignore[arg-type]


def record_of(engine: Path):  # type: ignore[no-untyped-def]
    record = Manifest.load(engine, "engine").tensorrt
    assert record is not None
    return record


@pytest.mark.parametrize("targets", [("sm120",), ("sm89",), ("sm80",), ("portable",), ("sm120", "sm89")])
def test_nano_builds_with_every_op_as_a_plugin(
    nano_graph: Path, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    built = build(nano_graph, tmp_path / "engine", *targets)
    record = record_of(tmp_path / "engine")
    manifest = Manifest.load(nano_graph)
    assert set(record.targets) == set(targets)
    assert record.bodies == ()
    assert {plugin.op for plugin in record.plugins} == {
        name for name in manifest.ops if not name.startswith("V4Expert")
    }
    assert sum(plugin.layers for plugin in record.plugins) == built.plugin_layers == 73
    plan = (tmp_path / "engine" / "model.plan").read_bytes()
    assert built.plan_bytes == len(plan)
    for plugin in record.plugins:
        assert plugin.op.encode() in plan
    assert plugin_hashes().items() >= {plugin.op: plugin.sha256 for plugin in record.plugins}.items()


@pytest.mark.parametrize("target", ["sm120", "portable"])
def test_fused_ops_are_plugins_and_their_parts_are_not(
    nano_optimized_graph: Path, tmp_path: Path, target: str
) -> None:
    built = build(nano_optimized_graph, tmp_path / "engine", target)
    record = record_of(tmp_path / "engine")
    assert record.bodies == ()
    layers = {plugin.op: plugin.layers for plugin in record.plugins}
    assert layers["V4HyperPostPre"] == 8
    assert {
        name: layers[name] for name in layers if name.endswith(("Projections", "Projection", "Prep"))
    } == {
        "V4WindowProjections": 1,
        "V4HcaProjections": 2,
        "V4CsaProjections": 1,
        "V4QueryProjection": 3,
        "V4CsaQueryProjections": 1,
        "V4HcaPrep": 2,
        "V4CsaPrep": 1,
        "V4AttentionPrep": 1,
    }
    assert not {"V4HyperPre", "V4RmsNorm", "V4Linear", "V4Compress"} & layers.keys()
    assert sum(layers.values()) == built.plugin_layers == 44


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of one unit for two targets and PTX, with bytes that stand for code."""
    folder, targets = tmp_path / "bundle", {}
    for target, name in (("sm80", "norm.cubin"), ("sm120", "norm.cubin"), ("portable", "norm.ptx")):
        path = folder / target / name
        path.parent.mkdir(parents=True)
        path.write_bytes(target.encode())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        targets[target] = {"files": {"norm": {"file": f"{target}/{name}", "sha256": digest}}}
    index = {"format": 1, "ptx_isa": "9.0", "kernels": {}, "targets": targets}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "plans.json").write_text("[]")
    return folder


@pytest.mark.parametrize(
    ("targets", "shipped"),
    [
        (("sm120",), {"sm120/norm.cubin"}),
        # An Ada GPU runs Ampere's kernels.
        (("sm89", "sm120"), {"sm80/norm.cubin", "sm120/norm.cubin"}),
        # PTX where nothing else runs.
        (("sm121",), {"portable/norm.ptx"}),
        (("portable",), {"sm80/norm.cubin", "sm120/norm.cubin", "portable/norm.ptx"}),
    ],
)
def test_an_engine_ships_the_kernels_of_its_targets(
    nano_graph: Path, tmp_path: Path, bundle: Path, targets: tuple[str, ...], shipped: set[str]
) -> None:
    build(nano_graph, tmp_path / "engine", *targets, bundle=bundle)
    folder = tmp_path / "engine" / "kernels"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*shipped, "index.json", "plans.json"}
    files = Manifest.load(tmp_path / "engine", "engine").files
    assert {name for name in files if name.startswith("kernels/")} == {f"kernels/{name}" for name in found}
    kernels = KernelFiles.load(folder)
    assert kernels is not None
    assert set(kernels.paths()) == found


def test_a_float32_engine_ships_none(nano_exact_graph: Path, tmp_path: Path, bundle: Path) -> None:
    build(nano_exact_graph, tmp_path / "engine", "sm120", bundle=bundle)
    assert not (tmp_path / "engine" / "kernels").exists()


def test_damaged_kernels_are_not_shipped(nano_graph: Path, tmp_path: Path, bundle: Path) -> None:
    (bundle / "sm120" / "norm.cubin").write_bytes(b"damaged")
    with pytest.raises(
        EngineError, match=r"sm120/norm\.cubin: is missing or was changed; compile the kernels"
    ):
        build(nano_graph, tmp_path / "engine", "sm120", bundle=bundle)
    assert not (tmp_path / "engine").exists()


def test_tensorrt_is_asked_for_the_workspace_of_the_largest_call(
    nano_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, int] = {}
    original = plugin_module.plan_workspace

    def record(spec: Any, attributes: Any, shapes: Any, dtypes: Any) -> int:
        size = original(spec, attributes, shapes, dtypes)
        asked[spec.name] = max(size, asked.get(spec.name, 0))
        return size

    monkeypatch.setattr(plugin_module, "plan_workspace", record)
    build(nano_graph, tmp_path / "engine", "sm120", limits=Limits(batch=2, input_len=64))
    # nano: 4 layers; hyper-connections keep 25 sums of 4 slices for each of 128 tokens.
    assert asked["V4HyperPre"] == 4 * 128 * 25 * 4
    assert asked["V4HyperPost"] == 0
    assert asked["V4MoE"] > 0


def test_exact_numerics_build_in_float32(nano_exact_graph: Path, tmp_path: Path) -> None:
    build(nano_exact_graph, tmp_path / "engine", "sm89")
    ops = {plugin.op for plugin in record_of(tmp_path / "engine").plugins}
    assert {"V4MoEFloat", "V4GroupedOutput", "V4Linear"} <= ops


def test_embedded_weights_go_into_the_plan(
    nano_embedded_graph: Path, nano_graph: Path, tmp_path: Path
) -> None:
    embedded = build(nano_embedded_graph, tmp_path / "embedded", "sm120")
    bound = build(nano_graph, tmp_path / "bound", "sm120")
    weights = (nano_embedded_graph / "weights.safetensors").stat().st_size
    assert embedded.plan_bytes - bound.plan_bytes >= weights * 0.9
    assert not list((tmp_path / "embedded").glob("*.safetensors"))


def test_weights_may_stream_where_they_are_in_the_plan(nano_embedded_graph: Path, tmp_path: Path) -> None:
    build(nano_embedded_graph, tmp_path / "e", "sm120", plan=PlanOptions(weight_streaming=True))
    assert record_of(tmp_path / "e").weight_streaming


def test_an_op_without_plugin_runs_as_its_body(nano_graph: Path, tmp_path: Path) -> None:
    build(nano_graph, tmp_path / "engine", "sm120", without_plugin=("V4HyperPre",))
    record = record_of(tmp_path / "engine")
    assert record.bodies == ("V4HyperPre",)
    assert "V4HyperPre" not in {plugin.op for plugin in record.plugins}
    assert sum(plugin.layers for plugin in record.plugins) == 73 - 8
    assert record.layers > 1000  # eight bodies in native layers


def test_nothing_with_a_plugin_keeps_a_body(nano_graph: Path) -> None:
    import onnx

    lowered = lower(nano_graph / "model.onnx", Manifest.load(nano_graph), ("sm120",), ())
    model = onnx.load_from_string(lowered.onnx)
    assert not model.functions
    counts = Counter(node.op_type for node in model.graph.node if node.domain == "v4graph")
    assert counts == lowered.plugins


def test_layers_are_named_after_the_checkpoint(nano_graph: Path) -> None:
    places = lower(nano_graph / "model.onnx", Manifest.load(nano_graph), ("sm120",), ()).places
    assert places["layers.2.attn.indexer.wq_b/V4Fp8Linear"] == (
        "layers.2.attn.indexer.wq_b/V4Fp8Linear (csa_topk layer)"
    )


def test_profiles_and_capacity_come_from_the_limits(nano_graph: Path, tmp_path: Path) -> None:
    build(nano_graph, tmp_path / "engine", "sm120", limits=Limits(batch=2, input_len=300, seq_len=1000))
    manifest = Manifest.load(tmp_path / "engine")
    assert manifest.max_seq_len == 1024
    assert record_of(tmp_path / "engine").profiles == (
        Profile("decode", (1, 2, 2), (1, 1, 8), (128, 1024, 1024)),
        Profile("prefill", (1, 1, 2), (1, 300, 300), (384, 1024, 1024)),
    )


def test_engine_directory_is_complete_without_the_graph(nano_graph: Path, tmp_path: Path) -> None:
    built = build(nano_graph, tmp_path / "engine", "sm120", bundle=tmp_path / "none")
    names = {path.name for path in (tmp_path / "engine").iterdir()}
    assert names == {
        "manifest.json", "model.plan", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    manifest = Manifest.load(tmp_path / "engine", "engine")
    assert manifest == built.manifest
    assert set(manifest.files) == names - {"manifest.json"}
    assert manifest.passes == ("StripPluginBodies", "InlineLayers")
    assert manifest.bindings == Manifest.load(nano_graph).bindings
    assert manifest.tools["tensorrt_rtx"].startswith("1.")


def test_dry_run_parses_and_writes_nothing(nano_graph: Path, tmp_path: Path) -> None:
    built = build(nano_graph, tmp_path / "engine", "sm120", dry_run=True)
    assert built.plugin_layers == 73
    assert not (tmp_path / "engine").exists()


def test_optimization_level_is_handed_on_and_the_lowered_graph_written(
    nano_graph: Path, tmp_path: Path
) -> None:
    options = PlanOptions(optimization_level=1, timing_cache=tmp_path / "timing.cache")
    build(nano_graph, tmp_path / "engine", "sm120", plan=options, lowered=tmp_path / "lowered.onnx")
    assert not (tmp_path / "timing.cache").exists()  # TensorRT for RTX has none
    assert (tmp_path / "lowered.onnx").stat().st_size
    assert record_of(tmp_path / "engine").optimization_level == 1
