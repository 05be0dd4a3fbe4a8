"""What transformers saves, in either spelling, opens, checks, binds and packs with equal values."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.names import official_name
from v4graph.checkpoint.pack import pack
from v4graph.config import UNQUANTISED, ModelConfig
from v4graph.errors import CheckpointError
from v4graph.manifest import Binding


@pytest.fixture(scope="module")
def model() -> Any:
    import oracles

    return oracles.build(oracles.SMALL, 0)


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


def state(model: Any) -> dict[str, np.ndarray]:
    """The state dict under official names, fused experts taken apart."""
    arrays: dict[str, np.ndarray] = {}
    for stored, tensor in model.state_dict().items():
        name, array = (
            official_name(stored),
            tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy(),
        )
        prefix = name.rpartition(".experts.")[0] + ".experts"
        if name.endswith("experts.gate_up"):
            inner = array.shape[1] // 2
            for e, matrix in enumerate(array):
                arrays[f"{prefix}.{e}.w1.weight"] = matrix[:inner]
                arrays[f"{prefix}.{e}.w3.weight"] = matrix[inner:]
        elif name.endswith(".experts.w2.weight"):
            arrays |= {f"{prefix}.{e}.w2.weight": matrix for e, matrix in enumerate(array)}
        else:
            arrays[name] = array
    return arrays


def assert_equal(checkpoint: Checkpoint, model: Any) -> None:
    expected = state(model)
    for name, array in expected.items():
        np.testing.assert_array_equal(checkpoint.array(name).astype(array.dtype), array, err_msg=name)


def test_save_pretrained_opens_with_equal_values(model: Any, saved: Path) -> None:
    checkpoint = Checkpoint.open(saved)
    checkpoint.check()
    assert checkpoint.weights == replace(UNQUANTISED, plain="float32") and not checkpoint.packed
    assert sorted(checkpoint.tensors) == sorted(state(model))
    assert_equal(checkpoint, model)


def test_config_of_save_pretrained_is_that_of_to_dict(model: Any, saved: Path) -> None:
    ours = ModelConfig.load(saved)
    assert ModelConfig.from_dict(model.config.to_dict(), source="to_dict") == ours
    assert [layer.kind for layer in ours.layers] == [
        "window_hash",
        "hca_hash",
        "csa_topk",
        "hca_topk",
        "csa_topk",
    ]
    assert (ours.layers[1].ratio, ours.qk_rope_head_dim, ours.compress_rope.factor) == (16, 64, 16)


def test_rope_frequencies_are_those_of_transformers(model: Any, saved: Path) -> None:
    config, rotary = ModelConfig.load(saved), model.model.rotary_emb
    for rope, label in ((config.rope, "main"), (config.compress_rope, "compress")):
        expected = getattr(rotary, f"{label}_inv_freq").numpy()
        np.testing.assert_allclose(rope.frequencies(), expected, rtol=2e-6)


def test_bfloat16_models_store_every_float_in_it(model: Any, tmp_path: Path) -> None:
    import copy

    halved = copy.deepcopy(model).bfloat16()
    halved.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert checkpoint.array("layers.0.hc_attn_fn").dtype == ml_dtypes.bfloat16
    assert_equal(checkpoint, halved)
    sink = Binding("s", "layers.{i}.attn.attn_sink", (0,), 0, "float32", (4,), ("as-is",), "F32")
    assert checkpoint.bind(sink, 0).dtype == np.float32


def test_module_names_with_fused_experts_open_too(model: Any, saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copy(saved / "config.json", tmp_path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check()
    assert checkpoint.packed
    assert_equal(checkpoint, model)
    stack = Binding(
        "w", "layers.{i}.ffn.experts.{e}.w3.weight", (1,), 8, "float32", (8, 64, 256), ("stack",), "F32"
    )
    got = checkpoint.bind(stack, 1)
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, Checkpoint.open(saved).bind(stack, 1))
    with pytest.raises(
        CheckpointError, match=r"experts\.w3\.weight is not contiguous; make a packed copy with"
    ):
        checkpoint.tensors.location("layers.1.ffn.experts.w3.weight")


def test_a_packed_copy_of_a_saved_model_has_its_values(model: Any, saved: Path, tmp_path: Path) -> None:
    pack(saved, tmp_path / "packed")
    checkpoint = Checkpoint.open(tmp_path / "packed")
    checkpoint.check()
    assert checkpoint.packed
    assert_equal(checkpoint, model)


def test_hub_form_written_by_quantising_reads_the_same_in_transformers(tmp_path: Path) -> None:
    import tiny
    from transformers import DeepseekV4Config

    from v4graph.config import OFFICIAL
    from v4graph.config.hub import hub_form

    theirs = DeepseekV4Config(**hub_form(tiny.config(), OFFICIAL))
    assert ModelConfig.from_dict(theirs.to_dict(), source="transformers") == tiny.config()
