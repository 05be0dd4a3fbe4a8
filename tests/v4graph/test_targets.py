"""Target names, what they hold, and where plans run."""

from __future__ import annotations

import pytest

from v4graph.errors import EngineError
from v4graph.targets import ARCHITECTURES, RTX_TARGETS, holding, parse, runs_on


@pytest.mark.parametrize("name", ["sm89", "SM89", "sm_89", "sm8.9"])
def test_spellings(name: str) -> None:
    assert parse([name]) == ("sm89",)


def test_targets_are_sorted_and_unique() -> None:
    assert parse(["sm120", "sm89", "sm120"]) == ("sm89", "sm120")


def test_unknown_target_gets_a_near_match() -> None:
    with pytest.raises(EngineError, match=r"--target sm12: no such target; did you mean 'sm12\d'"):
        parse(["sm12"])


def test_fp8_needs_ada_and_fp4_blackwell() -> None:
    assert "sm86" not in holding({"fp8"}, ARCHITECTURES)
    assert holding({"fp4"}, RTX_TARGETS) == ("sm120", "sm121")


@pytest.mark.parametrize("rtx", [True, False])
def test_portable_runs_from_ampere_on(rtx: bool) -> None:
    assert runs_on(("portable",), "sm86", rtx=rtx)
    assert not runs_on(("portable",), "sm75", rtx=rtx)
    assert not runs_on(("sm80",), "sm86", rtx=rtx)


def test_tensorrt_for_rtx_leaves_hopper_and_datacentre_blackwell_to_full_tensorrt() -> None:
    for gpu in ("sm90", "sm100"):
        assert runs_on(("portable",), gpu, rtx=False)
        assert not runs_on(("portable",), gpu, rtx=True)
    assert runs_on(("portable",), "sm130", rtx=True)
