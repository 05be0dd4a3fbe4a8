"""Every op's kernels, run by the emulator, against the op's torch reference."""

from __future__ import annotations

import pytest
from kernel_cases import ALL_CASES
from kernel_run import KernelCase, check

from v4graph_plugins.emulator import Emulator
from v4graph_plugins.kernel_launcher import KernelLauncher


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_kernels_equal_the_reference(case: KernelCase) -> None:
    for seed in (0, 1, 2):
        check(case, KernelLauncher(Emulator(seed)), seed=seed)
