"""Every op has all its implementations, and docs/kernels.md says what is there."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from kernel_cases import ALL_CASES

from v4graph.launch import PLANS
from v4graph.ops import OpSpec
from v4graph_plugins.bundle import ARCHITECTURES
from v4graph_plugins.catalogue import BUNDLE, PLUGIN_OPS
from v4graph_plugins.emulator import Emulator
from v4graph_plugins.kernel_files import KernelFiles
from v4graph_plugins.kernel_gates import problems

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    """benchmarks/kernel_floors.py as a module."""
    folder = REPO / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("kernel_floors", folder / "kernel_floors.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.fixture(scope="module")
def bundle() -> KernelFiles:
    files = KernelFiles.load(BUNDLE)
    if files is None or set(files.targets) != set(ARCHITECTURES):
        pytest.skip("the kernels are not compiled for every target here; compile them with `make kernels`")
    return files


@pytest.mark.parametrize("spec", PLUGIN_OPS, ids=lambda spec: spec.name)
def test_an_op_has_a_reference_a_body_kernels_and_cases(spec: OpSpec, floors: ModuleType) -> None:
    assert callable(spec.reference)
    assert floors.has_body(spec)
    launched = {step.kernel for step in PLANS[spec.name].steps}
    assert all(Emulator().signature(kernel) for kernel in launched)
    cases = [case.case for case in ALL_CASES if case.case.op == spec.name]
    run = {launch.kernel for case in cases for launch in case.launches()}
    assert run == launched, f"kernels that no case runs: {launched - run}"


def test_every_kernel_is_compiled_for_every_target_within_its_limits(
    bundle: KernelFiles, floors: ModuleType
) -> None:
    assert problems(bundle) == []
    for spec in PLUGIN_OPS:
        assert all(floors.compiled(spec, bundle, target) for target in ARCHITECTURES), spec.name


def test_the_tables_of_the_page_are_current(floors: ModuleType) -> None:
    text = floors.PAGE.read_text()
    begin, end = text.index("<!-- floors -->"), text.index("<!-- /floors -->")
    assert text[begin:end] == f"<!-- floors -->\n{floors.floors()}\n", "run benchmarks/kernel_floors.py"


def test_the_coverage_table_is_current(bundle: KernelFiles, floors: ModuleType) -> None:
    assert floors.filled(floors.PAGE.read_text()) == floors.PAGE.read_text()
    assert "| no |" not in floors.coverage()


def test_the_resource_table_lists_every_kernel(bundle: KernelFiles) -> None:
    text = (REPO / "docs" / "kernel-resources.md").read_text()
    missing = [kernel for kernel in bundle.index["kernels"] if f"| {kernel} |" not in text]
    assert not missing, "run `make kernel-docs`"
