"""Planted errors are located to their layer and op, saved in kilobytes, and run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import Result
from engines import NANO, Built
from graphs import change

from v4graph.config import ModelConfig
from v4graph.verify.repro import Repro

Verify = Callable[..., Result]


def function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    return next(f for f in model.functions if f.name == name)


def wrong_rope(model: onnx.ModelProto) -> None:
    """The layers with an indexer rotate by the base of those without."""
    main = next(i for i in model.graph.initializer if i.name == "rope.main.freqs")
    wrong = onnx.TensorProto()
    wrong.CopyFrom(main)
    wrong.name = "rope.wrong.freqs"
    model.graph.initializer.append(wrong)
    for node in model.graph.node:
        if node.op_type.startswith("V4Layer_csa"):
            for i, name in enumerate(node.input):
                if name == "rope.compress.freqs":
                    node.input[i] = wrong.name


def clamp_after(model: onnx.ModelProto) -> None:
    """The limit clamps the product of gate and value, not each before it."""
    body = function(model, "V4ExpertFloat")
    gate, value = ([n for n in body.node if n.op_type == "Gemm"][i].output[0] for i in (0, 1))
    first_min, second_min = (n for n in body.node if n.op_type == "Min")
    limit = first_min.input[1]
    lower = next(n for n in body.node if n.op_type == "Max")
    first_min.CopyFrom(onnx.helper.make_node("Identity", [gate], [first_min.output[0]]))
    second_min.CopyFrom(onnx.helper.make_node("Identity", [value], [second_min.output[0]]))
    body.node.remove(lower)
    product = next(n for n in body.node if n.op_type == "Mul" and second_min.output[0] in n.input)
    clamped = product.output[0]
    product.output[0] = "unclamped"
    at = list(body.node).index(product) + 1
    body.node.insert(at, onnx.helper.make_node("Min", ["unclamped", limit], [clamped]))


def comb_as_it_is(model: onnx.ModelProto) -> None:
    """The streams are mixed by comb, not by its transpose."""
    body = function(model, "V4HyperPost")
    turn = next(n for n in body.node if n.op_type == "Transpose")
    turn.CopyFrom(onnx.helper.make_node("Identity", [turn.input[0]], [turn.output[0]]))


def scores_not_rooted(model: onnx.ModelProto) -> None:
    """Experts are weighted by softplus, not by its root."""
    body = function(model, "V4RouteTopK")
    root = next(n for n in body.node if n.op_type == "Sqrt")
    root.CopyFrom(onnx.helper.make_node("Identity", [root.input[0]], [root.output[0]]))


def located(result: object) -> dict[str, object]:
    culprit: dict[str, object] = json.loads(result.stdout)["culprit"]  # type: ignore[attr-defined]
    return culprit


def test_a_wrong_rope_base_is_found_in_the_first_csa_layer(
    nano_v4: Path, nano_exact: Path, tmp_path: Path, verify: Verify
) -> None:
    first = next(i for i, layer in enumerate(ModelConfig.load(NANO).layers) if layer.attention == "csa")
    for graph, op in ((nano_v4, "V4CsaPrep"), (nano_exact, "V4AttentionPrep")):
        broken = change(graph, tmp_path / op, wrong_rope)
        result = verify(NANO, broken, "--json")
        assert result.exit_code == 1, result.output
        culprit = located(result)
        assert (culprit["layer"], culprit["op"]) == (f"layers.{first}", op)
        assert "It reads other freqs than config.json gives." in str(culprit["sentence"])


def test_a_clamp_after_the_product_is_found_in_the_experts(
    oracle: Built, tmp_path: Path, verify: Verify
) -> None:
    broken = change(oracle.engine.parent / "graph", tmp_path / "graph", clamp_after)
    result = verify(f"transformers:{oracle.checkpoint}", broken, "--json", "--tokens", 20)
    assert result.exit_code == 1, result.output
    assert (located(result)["layer"], located(result)["op"]) == ("layers.0", "V4MoEFloat")


@pytest.mark.parametrize("numerics", ["exact", "v4"])
def test_a_comb_that_is_not_transposed_is_found(
    nano_v4: Path, nano_exact: Path, tmp_path: Path, verify: Verify, numerics: str
) -> None:
    graph = nano_exact if numerics == "exact" else nano_v4
    result = verify(NANO, change(graph, tmp_path / "graph", comb_as_it_is), "--json")
    assert result.exit_code == 1, result.output
    # Four equal streams mix the same either way, so it shows first where layer 0 ends: where layer 1 begins.
    assert (located(result)["layer"], located(result)["op"]) == ("layers.1", "V4HyperPostPre")


def test_a_reproducer_is_small_and_runs_again(nano_v4: Path, tmp_path: Path, verify: Verify) -> None:
    result = verify(NANO, change(nano_v4, tmp_path / "graph", comb_as_it_is), "--json")
    saved = tmp_path / "repro.npz"
    assert located(result)["repro"] == str(saved)
    assert saved.stat().st_size < 16 << 10
    again = verify("--repro", saved)
    assert again.exit_code == 1
    assert "V4HyperPostPre, its V4HyperPost: output 'z': " in again.stdout
    with np.load(saved) as archive:
        assert archive["given.y"].shape[:2] == (1, 1)
        right = {name: archive[name] for name in archive.files}
    model = onnx.load_from_string(right["model"].tobytes())
    body = function(model, "V4HyperPost")
    turn = next(n for n in body.node if n.op_type == "Identity" and n.input[0] == "comb")
    turn.CopyFrom(onnx.helper.make_node("Transpose", ["comb"], [turn.output[0]], perm=[0, 1, 3, 2]))
    right["model"] = np.frombuffer(model.SerializeToString(), np.uint8)
    np.savez(tmp_path / "right.npz", **right)  # type: ignore[arg-type]
    mended = verify("--repro", tmp_path / "right.npz")
    assert mended.exit_code == 0, mended.output
    assert "agrees with its reference" in mended.stdout


def test_a_reproducer_keeps_matrices_in_bfloat16(nano_exact: Path, tmp_path: Path, verify: Verify) -> None:
    result = verify(NANO, change(nano_exact, tmp_path / "graph", scores_not_rooted), "--json")
    assert located(result)["op"] == "V4RouteTopK"
    saved = Path(str(located(result)["repro"]))
    assert Repro.load(saved).given["gate"].dtype.name == "bfloat16"
    again = verify("--repro", saved)
    assert again.exit_code == 1
    assert "V4RouteTopK: output 'ids': " in again.stdout


def test_text_names_the_op_and_the_file(nano_v4: Path, tmp_path: Path, verify: Verify) -> None:
    result = verify(NANO, change(nano_v4, tmp_path / "graph", comb_as_it_is))
    assert "they disagree (mean KL 0.005, argmax 95% where decided)" in result.stdout
    assert "first wrong op: layers.1/V4HyperPostPre in layers.1 (hca_topk), output" in result.stdout
    assert "run it with `v4graph verify --repro FILE`" in result.stdout
