"""The binding table covers the official inventory exactly."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from v4graph.config import OFFICIAL, UNQUANTISED, ModelConfig, WeightFormat
from v4graph.inventory import inventory
from v4graph.manifest import Binding
from v4graph_export.bindings import model_bindings, unbound
from v4graph_export.flavour import Flavour

BASE = WeightFormat(linear="fp8", scale="float32", expert="fp8")


def covered(bindings: tuple[Binding, ...]) -> Counter[str]:
    names: Counter[str] = Counter()
    for binding in bindings:
        for _, layer in binding.inputs():
            names.update([*binding.tensors(layer), *binding.scales(layer)])
    return names


@pytest.mark.parametrize("numerics", ["v4", "exact"])
@pytest.mark.parametrize(("preset", "tensors"), [("flash", 69_187), ("pro", 145_116)])
def test_every_official_tensor_is_bound_once_or_listed_as_unbound(
    preset: str, tensors: int, numerics: str
) -> None:
    config = ModelConfig.load(preset)
    flavour = Flavour(numerics, "float32", config.weight_format)
    names = covered(model_bindings(config, flavour))
    expected = {tensor.name for tensor in inventory(config)}
    mtp = {name for name in expected if name.startswith("mtp.")}
    assert len(expected) == tensors
    assert set(names) == expected - mtp
    assert set(names.values()) == {1}
    listed = unbound(config, flavour)
    assert [entry.pattern for entry in listed] == ["mtp.0.*"]
    assert sum(entry.tensors for entry in listed) == len(mtp)


@pytest.mark.parametrize(
    ("preset", "total"), [("flash", 159_609_485_896), ("pro", 864_704_792_696)], ids=["flash", "pro"]
)
def test_bound_and_unbound_bytes_add_up_to_the_published_size(preset: str, total: int) -> None:
    config = ModelConfig.load(preset)
    flavour = Flavour("v4", "bfloat16", config.weight_format)
    size = {tensor.name: tensor.nbytes for tensor in inventory(config)}
    bound = sum(size[name] for name in covered(model_bindings(config, flavour)))
    assert bound + sum(entry.bytes for entry in unbound(config, flavour)) == total


@pytest.mark.parametrize("weights", [OFFICIAL, BASE, UNQUANTISED], ids=["official", "base", "unquantised"])
def test_exact_numerics_binds_float32_and_plain_matrices_as_stored(weights: WeightFormat) -> None:
    config = ModelConfig.load("flash").shrink(layers=4, experts=8)
    bindings = model_bindings(config, Flavour("exact", "float32", weights))
    assert {binding.dtype for binding in bindings} == {"float32", "bfloat16", "int64"}
    narrow = [binding for binding in bindings if binding.dtype == "bfloat16"]
    assert all(len(b.shape) > 1 and b.layout in (("as-is",), ("stack",)) for b in narrow)
    assert {b.layout for b in bindings if b.stored_dtype == "BF16"} <= {("as-is",), ("stack",), ("cast",)}
    assert all(len(b.shape) == 1 for b in bindings if "cast" in b.layout)


@pytest.mark.parametrize("weights", [OFFICIAL, UNQUANTISED], ids=["official", "unquantised"])
def test_matrices_that_are_not_all_bf16_are_widened(weights: WeightFormat) -> None:
    config = ModelConfig.load("flash").shrink(layers=4, experts=8)
    bindings = model_bindings(config, Flavour("exact", "float32", replace(weights, plain="float32")))
    assert {binding.dtype for binding in bindings} == {"float32", "int64"}


def test_v4_numerics_in_bf16_converts_no_tensor() -> None:
    config = ModelConfig.load("flash")
    for binding in model_bindings(config, Flavour("v4", "bfloat16", OFFICIAL)):
        assert set(binding.layout) <= {"as-is", "bytes", "stack"}, binding.input
