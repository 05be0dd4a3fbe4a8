"""Every call that the kernels are tested on, on the emulator and on a GPU."""

from __future__ import annotations

import kernel_cases_attention
import kernel_cases_compress
import kernel_cases_fused
import kernel_cases_hyper
import kernel_cases_index
import kernel_cases_linear
import kernel_cases_moe
import kernel_cases_prep
from kernel_run import KernelCase

ALL_CASES: tuple[KernelCase, ...] = (
    *kernel_cases_hyper.cases(),
    *kernel_cases_linear.cases(),
    *kernel_cases_prep.cases(),
    *kernel_cases_compress.cases(),
    *kernel_cases_index.cases(),
    *kernel_cases_attention.cases(),
    *kernel_cases_moe.cases(),
    *kernel_cases_fused.cases(),
)
