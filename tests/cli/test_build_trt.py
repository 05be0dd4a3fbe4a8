"""`v4graph build --backend trt` and `inspect` as a user sees them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from engines import NANO
from graphs import export_nano

from v4graph.cli import _UserError
from v4graph.errors import EngineError
from v4graph.gpu import gpus

Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_nano(tmp_path_factory.mktemp("trt") / "graph", max_seq_len=1024)


@pytest.fixture(scope="module")
def engine(graph: Path, cli: Cli) -> Path:
    folder = graph.parent / "engine"
    result = cli("build", graph, folder, "--backend", "trt", "--target", "sm89", "--target", "sm120")
    assert result.exit_code == 0, result.output
    return folder


def test_says_which_tensorrt_and_why_and_what_came_out(graph: Path, tmp_path: Path, cli: Cli) -> None:
    out = cli("build", graph, tmp_path / "e", "--backend", "trt", "--tensorrt", "rtx").stdout
    assert out.startswith("with TensorRT for RTX 1.")
    assert "(as asked)" in out
    assert "trt engine for portable, 4 layers, 44 plugin layers, plan " in out
    assert "decode   batch 1..8  tokens 1..8     capacity 128..1024" in out
    assert "prefill  batch 1..8  tokens 1..1024  capacity 1024..1024" in out


def test_json_has_the_same(graph: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("--backend", "trt", "--target", "sm120", "--no-plugin", "V4HyperHead", "--dry-run", "--json")
    report = json.loads(cli("build", graph, tmp_path / "e", *arguments).stdout)
    assert report["engine"] is None
    assert report["targets"] == ["sm120"]
    assert report["bodies"] == ["V4HyperHead"]
    assert report["plugin_layers"] == 43
    assert report["tensorrt"]["package"] == "tensorrt_rtx"
    assert not (tmp_path / "e").exists()


def test_inspect_reads_the_manifest_and_never_the_plan(engine: Path, cli: Cli) -> None:
    plan = engine / "model.plan"
    kept = plan.read_bytes()
    plan.write_bytes(b"")
    try:
        out = cli("inspect", engine).stdout
    finally:
        plan.write_bytes(kept)
    assert "backend trt, v4 numerics in bfloat16, 1024 tokens" in out
    assert "plan: tensorrt_rtx 1." in out
    assert "(CUDA 13) for sm89, sm120, " in out
    assert "V4HyperPostPre         8" in out
    report = json.loads(cli("inspect", engine, "--json").stdout)
    assert report["passes"][-2:] == ["StripPluginBodies", "InlineLayers"]
    assert [profile["name"] for profile in report["tensorrt"]["profiles"]] == ["decode", "prefill"]


def test_trtexec_line_has_every_profile_and_target(graph: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("--backend", "trt", "--target", "sm89", "--target", "sm120", "--print-trtexec")
    out = cli("build", graph, tmp_path / "e", *arguments, "--builder-optimization-level", 2).stdout
    assert out.startswith("tensorrt_rtx --onnx=")
    assert "--computeCapabilities=8.9,12.0" in out
    assert "--builderOptimizationLevel=2" in out
    assert "--profile=0 --minShapes=input_ids:1x1,start_pos:1,num_tokens:1,state.0.window:1x136x512," in out
    assert "--profile=1" in out
    assert "state.2.compressed:8x256x512" in out
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--target", "sm89"), "--target is TensorRT's; add --backend trt or leave it out."),
        (("--dry-run",), "--dry-run is TensorRT's"),
        (("--backend", "trt", "--provider", "cuda"), "--provider is onnxruntime's; add --backend ort"),
    ],
)
def test_options_of_the_other_backend_are_refused(
    graph: Path, tmp_path: Path, cli: Cli, arguments: tuple[str, ...], text: str
) -> None:
    result = cli("build", graph, tmp_path / "e", *arguments)
    assert result.exit_code == 2
    assert text in result.stderr


def test_tensorrts_words_stand_below_ours() -> None:
    error = _UserError(EngineError("the graph\n cannot be built.", detail="TensorRT: a\nTensorRT: b"))
    text = io.StringIO()
    error.show(text)
    assert text.getvalue() == "Error: the graph cannot be built.\n  TensorRT: a\n  TensorRT: b\n"


def test_an_engine_that_cannot_run_here_says_so(engine: Path, cli: Cli) -> None:
    if gpus():
        pytest.skip("this machine has a GPU: tests/gpu runs the engine")
    result = cli("run", engine, "--checkpoint", NANO, "--prompt", "In")
    assert result.exit_code == 2
    assert "no NVIDIA GPU with a working driver is found" in result.stderr
    assert "--backend ort" in result.stderr
