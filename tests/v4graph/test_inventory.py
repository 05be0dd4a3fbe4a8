"""The inventory computed from the configuration is the published one, tensor by tensor."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny

from v4graph.config import OFFICIAL, UNQUANTISED, ModelConfig, WeightFormat
from v4graph.inventory import (
    Role,
    StoredTensor,
    TensorSpec,
    inventory,
    layer_tensors,
    model_tensors,
    mtp_tensors,
    stored,
    weight_specs,
)

FLASH = {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34167, "I64": 3, "I8": 33792}
PRO = {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71952, "I64": 3, "I8": 71424}


@pytest.mark.parametrize(
    ("preset", "tensors", "size", "dtypes"),
    [("flash", 69_187, 159_609_485_896, FLASH), ("pro", 145_116, 864_704_792_696, PRO)],
)
def test_inventory_equals_the_published_index(
    preset: str, tensors: int, size: int, dtypes: dict[str, int]
) -> None:
    found = list(inventory(ModelConfig.load(preset)))
    assert len(found) == len({tensor.name for tensor in found}) == tensors
    assert sum(tensor.nbytes for tensor in found) == size
    assert Counter(tensor.dtype for tensor in found) == dtypes


@pytest.mark.parametrize(
    ("preset", "tensors", "size"), [("flash", 1_575, 3_593_787_756), ("pro", 2_343, 13_956_587_692)]
)
def test_mtp_part_has_the_published_size(preset: str, tensors: int, size: int) -> None:
    found = [tensor for tensor in inventory(ModelConfig.load(preset)) if tensor.name.startswith("mtp.")]
    assert (len(found), sum(tensor.nbytes for tensor in found)) == (tensors, size)


def test_one_expert_spec_stands_for_all() -> None:
    config = ModelConfig.load("flash")
    names = [spec.name for spec in layer_tensors(config, config.layers[5]) if spec.role is Role.EXPERT]
    assert names == [f"ffn.experts.{{e}}.{w}.weight" for w in ("w1", "w2", "w3")]


def test_layer_kinds_differ_in_their_own_tensors_only() -> None:
    config = tiny.config()
    window, csa, hca, csa_topk = (
        {spec.name for spec in layer_tensors(config, layer)} for layer in config.layers
    )
    compressor = {f"compressor.{name}" for name in ("ape", "wkv.weight", "wgate.weight", "norm.weight")}
    indexer = {
        "indexer.wq_b.weight",
        "indexer.weights_proj.weight",
        *(f"indexer.{name}" for name in compressor),
    }
    assert csa - window == {f"attn.{name}" for name in compressor | indexer}
    assert hca - window == {*(f"attn.{name}" for name in compressor), "ffn.gate.bias"}
    assert csa ^ csa_topk == {"ffn.gate.tid2eid", "ffn.gate.bias"}


def test_csa_compressors_are_twice_as_wide() -> None:
    config = tiny.config()
    shapes = [{spec.name: spec.shape for spec in layer_tensors(config, layer)} for layer in config.layers]
    assert shapes[1]["attn.compressor.wkv.weight"] == (256, 128)
    assert shapes[2]["attn.compressor.wkv.weight"] == (128, 128)
    assert shapes[1]["attn.indexer.compressor.ape"] == (4, 256)


def test_scales_cover_ragged_blocks() -> None:
    spec = TensorSpec("w.weight", Role.LINEAR, (129, 300))
    assert stored(spec, OFFICIAL) == (
        StoredTensor("w.weight", "F8_E4M3", (129, 300)),
        StoredTensor("w.scale", "F8_E8M0", (2, 3)),
    )
    assert stored(spec, WeightFormat("fp8", "float32", "fp4"))[1].dtype == "F32"


@pytest.mark.parametrize(
    ("expert", "weight", "scale"),
    [
        ("fp4", StoredTensor("e.weight", "I8", (256, 64)), ("F8_E8M0", (256, 4))),
        ("fp8", StoredTensor("e.weight", "F8_E4M3", (256, 128)), ("F8_E8M0", (2, 1))),
        ("float", StoredTensor("e.weight", "BF16", (256, 128)), None),
    ],
)
def test_experts_have_three_formats(
    expert: str, weight: StoredTensor, scale: tuple[str, tuple[int, ...]] | None
) -> None:
    spec = TensorSpec("e.weight", Role.EXPERT, (256, 128))
    tensors = stored(spec, WeightFormat("fp8", "e8m0", expert))  # type: ignore[arg-type]
    assert tensors[0] == weight
    assert [(tensor.dtype, tensor.shape) for tensor in tensors[1:]] == ([scale] if scale else [])


def test_unquantised_inventory_has_no_scales() -> None:
    found = list(inventory(tiny.config(), UNQUANTISED))
    assert not [tensor for tensor in found if tensor.name.endswith(".scale")]
    assert len(found) == len(list(weight_specs(tiny.config())))


def test_mtp_layer_has_its_own_projections_and_head() -> None:
    names = {spec.name for spec in mtp_tensors(tiny.config(), 0)}
    extra = {"e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight"}
    assert extra | {"hc_head_fn", "hc_head_base", "hc_head_scale", "attn.wq_a.weight"} <= names
    assert {spec.name for spec in model_tensors(tiny.config())} >= {"embed.weight", "head.weight"}
