"""Splits hold every byte once, fit or say what does not, and the estimates follow their formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from v4graph.config import ModelConfig
from v4graph.config.types import OFFICIAL
from v4graph.errors import ConfigError
from v4graph.planning.cache import CacheFormat
from v4graph.planning.estimate import BOUND, Assumptions, estimate, step_seconds
from v4graph.planning.hardware import TABLE, GpuSpec, find, known
from v4graph.planning.placement import Load, Placer, largest
from v4graph.planning.report import Request, make_report
from v4graph.planning.work import Step, work

M = 1 << 20
FLASH, PRO = ModelConfig.load("flash"), ModelConfig.load("pro")


def placer(config: ModelConfig, batch: int = 1, context: int = M) -> Placer:
    return Placer(config, OFFICIAL, Load(batch, context, CacheFormat()))


def report(config: ModelConfig, gpu: str, gpus: int, batch: int = 1, context: int = M) -> dict[str, object]:
    request = Request(Load(batch, context, CacheFormat()), find(gpu), gpus)
    return make_report("model", config, OFFICIAL, request)["placement"]


@pytest.mark.parametrize("gpus", [2, 3, 8, 13])
def test_a_pipeline_holds_every_weight_and_state_once(gpus: int) -> None:
    one, split = placer(FLASH).one(), placer(FLASH).pipeline(gpus)
    assert len(split.gpus) <= gpus
    assert sum(part.weights for part in split.gpus) == one.largest.weights
    assert sum(part.states for part in split.gpus) == one.largest.states


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_expert_parallelism_spreads_the_experts_and_repeats_the_rest(gpus: int) -> None:
    found = placer(FLASH)
    split = found.experts(gpus)
    experts = sum(found.resident.experts)
    others = found.resident.total - experts
    assert sum(part.weights for part in split.gpus) == experts + gpus * others


def test_slots_are_divided_among_expert_parallel_gpus() -> None:
    one = placer(FLASH, batch=1, context=8192).one().largest.states
    split = placer(FLASH, batch=7, context=8192).experts(4)
    assert split.largest.states == 2 * one


def test_flash_does_not_fit_one_h200_and_fits_two_or_one_with_a_host() -> None:
    found = report(FLASH, "h200", 1)
    assert found["fits"] is False
    assert found["weights_alone_need"] == 2
    nearest = [(split["kind"], split["gpus"], split["gpu"]) for split in found["nearest"]]
    assert nearest == [
        ("pipeline", 2, "h200"),
        ("expert parallel", 2, "h200"),
        ("experts in host memory", 1, "h200"),
        ("one GPU", 1, "b200"),
    ]
    # Six experts of each of 43 layers cross to the GPU for every token.
    assert found["nearest"][2]["host_bytes_per_token"] == 43 * 6 * 13_369_344


def test_pro_needs_more_than_the_published_eight_h100() -> None:
    """850.7 GB of weights do not fit in 640 GB, whatever the split; docs/planning.md shows the arithmetic."""
    found = report(PRO, "h100-80g", 8, context=8192)
    assert found["fits"] is False
    assert found["weights_alone_need"] == 11
    assert found["nearest"][0]["gpus"] > 8


def test_where_no_number_of_a_gpu_does_the_largest_known_ones_are_named() -> None:
    nearest = report(PRO, "rtx5090", 1, batch=512)["nearest"]
    assert nearest
    assert {split["gpu"] for split in nearest} == {"b300"}
    assert all(split["fits"] for split in nearest)


def test_a_host_that_shares_its_memory_is_no_place_for_experts() -> None:
    nearest = report(FLASH, "gb10", 1)["nearest"]
    assert "experts in host memory" not in [split["kind"] for split in nearest]


def test_the_largest_batch_and_context_are_the_last_that_fit() -> None:
    found = report(FLASH, "h200", 2, context=131072)
    most, longest = found["largest_batch"], found["longest_context"]
    assert most > 1
    assert longest == M
    assert report(FLASH, "h200", 2, batch=most, context=131072)["fits"]
    assert not report(FLASH, "h200", 2, batch=most + 1, context=131072)["fits"]
    tight = report(FLASH, "b200", 1, batch=6)
    at_most = tight["longest_context"]
    assert 0 < at_most < M
    assert report(FLASH, "b200", 1, batch=6, context=at_most)["fits"]
    assert not report(FLASH, "b200", 1, batch=6, context=at_most + 128)["fits"]


@given(st.integers(1, 500), st.integers(0, 600), st.sampled_from([1, 7]))
def test_the_search_finds_the_last_that_fits(high: int, limit: int, step: int) -> None:
    high *= step
    found = largest(step, high, lambda n: n <= limit, step)
    assert found == max((n for n in range(step, high + 1, step) if n <= limit), default=0)


def test_a_step_takes_the_sum_of_its_ops_and_its_launches() -> None:
    done = work(FLASH, Step(1, 1, 8000), CacheFormat())
    slow = replace(find("h200"), bandwidth_gb_s=1, bf16_tflops=1e9)
    assert step_seconds(done, slow, BOUND) == pytest.approx(done.bytes / 1e9)
    launches = step_seconds(done, slow, replace(BOUND, launch_us=1e6)) - done.bytes / 1e9
    assert launches == pytest.approx(done.launches)
    half = step_seconds(done, slow, replace(BOUND, bandwidth_share=0.5))
    assert half == pytest.approx(2 * done.bytes / 1e9)


def test_an_estimate_is_never_faster_than_its_bound() -> None:
    load = Load(4, 131072, CacheFormat())
    found = Placer(FLASH, OFFICIAL, load)
    gpu = find("h200")
    for split in (found.pipeline(2), found.experts(2), found.host_experts()):
        slow, fast = (estimate(FLASH, load, split, gpu, assume) for assume in (Assumptions(), BOUND))
        assert slow.decode_seconds > fast.decode_seconds
        assert slow.prefill_seconds > fast.prefill_seconds
        assert slow.tokens_per_second == pytest.approx(4 / slow.decode_seconds)


def test_experts_in_host_memory_pay_for_crossing() -> None:
    load = Load(1, 8192, CacheFormat())
    split = Placer(FLASH, OFFICIAL, load).host_experts()
    gpu = find("h200")
    assert estimate(FLASH, load, split, gpu, BOUND).decode_seconds > split.crossing / (gpu.host_gb_s * 1e9)


def test_every_known_gpu_reads_and_has_a_target() -> None:
    assert {"h100-80g", "h200", "b200", "rtx5090", "rtxpro6000", "gb10"} <= set(known())
    assert all(isinstance(gpu, GpuSpec) for gpu in known().values())


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    table = TABLE.read_text().split("[h200]\n")[1].split("\n\n")[0]
    path.write_text(table)
    assert find(str(path)) == replace(find("h200"), name="mine")
    path.write_text(f"[other]\n{table}")
    assert find(str(path)).name == "other"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("memory_gb = 141", "memory_gb = 0"), "memory_gb is 0, expected a number above 0"),
        (("memory_gb = 141", 'memory_gb = "141"'), "memory_gb is '141', expected a number"),
        (("memory_gb", "memory_gib"), "unknown key 'memory_gib'; did you mean 'memory_gb'?"),
        (("memory_gb = 141\n", ""), "no memory_gb; a GPU needs title, target, memory_gb"),
        (('"sm90"', '"sm91"'), "target is 'sm91'; did you mean"),
        (("memory_gb = 141", "memory_gb ="), "not valid TOML"),
    ],
)
def test_a_bad_gpu_file_is_one_clear_sentence(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    table = TABLE.read_text().split("[h200]\n")[1].split("\n\n")[0]
    path.write_text(table.replace(*change))
    with pytest.raises(ConfigError) as raised:
        find(str(path))
    assert message in str(raised.value)
    assert "mine.toml" in str(raised.value)


def test_an_unknown_gpu_names_near_matches() -> None:
    with pytest.raises(ConfigError, match="--gpu b20O: no such GPU; did you mean 'b200'"):
        find("b20O")
