"""The figures that DeepSeek published for V4, counted from config.json. docs/planning.md derives them."""

from __future__ import annotations

import pytest

from v4graph.config import ModelConfig
from v4graph.config.types import OFFICIAL
from v4graph.inventory import inventory
from v4graph.planning import reference
from v4graph.planning.cache import PACKED, CacheFormat, bytes_per_token
from v4graph.planning.comparison import compare, published_flops
from v4graph.planning.weights import parameters, tally
from v4graph.planning.work import Step, work

M = 1 << 20


@pytest.mark.parametrize(
    ("model", "tensors", "nbytes", "types"),
    [
        (
            "flash",
            69_187,
            159_609_485_896,
            {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792},
        ),
        (
            "pro",
            145_116,
            864_704_792_696,
            {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I64": 3, "I8": 71_424},
        ),
    ],
)
def test_a_checkpoint_is_that_of_the_published_index(
    model: str, tensors: int, nbytes: int, types: dict[str, int]
) -> None:
    found = tally(ModelConfig.load(model), OFFICIAL)
    assert (found.tensors, found.bytes) == (tensors, nbytes)
    assert found.by_type == types


@pytest.mark.parametrize("model", ["nano", "flash"])
def test_the_tally_is_the_sum_of_the_inventory(model: str) -> None:
    config = ModelConfig.load(model)
    listed = list(inventory(config, OFFICIAL))
    found = tally(config, OFFICIAL)
    assert found.bytes == sum(tensor.nbytes for tensor in listed) == sum(found.by_part.values())
    assert found.tensors == len(listed)
    mtp = tally(config, OFFICIAL, mtp=True)
    assert mtp.bytes == sum(tensor.nbytes for tensor in listed if tensor.name.startswith("mtp."))


def test_parameters_are_284b_of_which_13b_and_1_6t_of_which_49b() -> None:
    flash, pro = (parameters(ModelConfig.load(name)) for name in ("flash", "pro"))
    assert (flash.main, flash.mtp) == (284_332_240_471, 6_610_048_891)
    assert (pro.main, pro.mtp) == (1_572_997_201_763, 25_840_145_979)
    assert flash.active == pytest.approx(13.27e9, abs=5e6)
    assert pro.active == pytest.approx(48.85e9, abs=5e6)


def test_v3_2_is_counted_as_its_report_does() -> None:
    assert reference.BYTES_PER_TOKEN == 48_068
    billions = [round(n / 1e9, 1) for n in reference.flops(10**6).values()]
    assert billions == [73.2, 999.4, 34.8]
    assert round(reference.fp8_flops(10**6) / 1e9) == 1142


# Percent of V3.2: cache, FLOPs as FP8 at 10^6 tokens and at 2^20, FLOPs unweighted at 10^6.
RATIOS = {
    ("flash", "fp8", "fp4"): (7.31, 10.05, 9.98, 12.2),
    ("flash", "fp8", "fp8"): (8.01, 13.82, 13.77, 12.2),
    ("flash", "bf16", "bf16"): (14.31, 21.35, 21.34, 12.2),
    ("pro", "fp8", "fp4"): (10.47, 26.82, 26.5, 26.6),
    ("pro", "fp8", "fp8"): (11.47, 32.2, 31.91, 26.6),
    ("pro", "bf16", "bf16"): (20.49, 42.96, 42.73, 26.6),
}


@pytest.mark.parametrize("case", RATIOS, ids="-".join)
def test_cache_and_flops_against_v3_2(case: tuple[str, str, str]) -> None:
    model, kv, index = case
    config = ModelConfig.load(model)
    million, full = (
        next(r for r in compare(config, n) if (r.cache.kv, r.cache.index) == (kv, index)) for n in (10**6, M)
    )
    cache, fp8, fp8_full, raw = RATIOS[case]
    assert 100 * million.cache_ratio == pytest.approx(cache, abs=0.006)
    assert 100 * million.fp8_ratio == pytest.approx(fp8, abs=0.06)
    assert 100 * full.fp8_ratio == pytest.approx(fp8_full, abs=0.06)
    assert 100 * million.flops_ratio == pytest.approx(raw, abs=0.06)
    assert million.cache.exists == (kv == "bf16")


def test_the_published_percentages() -> None:
    """Flash 10 % of the FLOPs and 7 % of the cache, Pro 27 % and 10 %."""
    for name, flops, cache in (("flash", 10, 7), ("pro", 27, 10)):
        packed = compare(ModelConfig.load(name), 10**6)[0]
        assert (round(100 * packed.fp8_ratio), round(100 * packed.cache_ratio)) == (flops, cache)


@pytest.mark.parametrize(("model", "gflop"), [("flash", (26.5, 86.0, 22.6)), ("pro", (97.7, 122.9, 73.6))])
def test_flops_of_the_ratio_by_part(model: str, gflop: tuple[float, ...]) -> None:
    parts = published_flops(ModelConfig.load(model), 10**6)
    assert [round(n / 1e9, 1) for n in parts.values()] == list(gflop)


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_the_ops_of_a_step_do_what_the_published_formula_counts(model: str) -> None:
    """The formula leaves out pooling, norms and mixing, and counts each norm's weight as a product."""
    config = ModelConfig.load(model)
    done = work(config, Step(1, 1, 10**6 - 1), PACKED)
    assert done.total_flops == pytest.approx(sum(published_flops(config, 10**6).values()), rel=5e-3)
    equivalents = next(r.fp8_flops for r in compare(config, 10**6) if r.cache == PACKED)
    assert done.fp8_flops == pytest.approx(equivalents, rel=5e-3)


def test_rows_of_the_caches_have_the_published_widths() -> None:
    config = ModelConfig.load("flash")
    assert (PACKED.kv_row(config), PACKED.index_row(config)) == (584, 68)
    assert CacheFormat("fp8", "fp8").index_row(config) == 132
    assert (CacheFormat().kv_row(config), CacheFormat().index_row(config)) == (1024, 256)
    assert bytes_per_token(config, PACKED) == 3514.25
    assert bytes_per_token(config, CacheFormat()) == 6880
