"""The emulator computes what a GPU computes, and notices what a GPU would not forgive."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from guarded import Guarded
from kernel_cases import ALL_CASES
from kernel_run import KernelCase, check

from v4graph.errors import EngineError
from v4graph.launch import Launch
from v4graph_plugins.emulator import KERNELS, Emulator, compile_unit
from v4graph_plugins.kernel_launcher import KernelLauncher

UNITS = Path(__file__).parent / "units"
SEEDS = range(8)
FROM = np.arange(1, 33, dtype=np.float32)


def launch(kernel: str, *arrays: Any, seed: int = 0, threads: int = 32, shared: int = 0) -> None:
    values = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    Emulator(seed, sources=UNITS).run(Launch(kernel, (1, 1, 1), threads, shared, ()), values, 0)


def fragments(matrix: np.ndarray[Any, Any], rows: int, per_word: int) -> np.ndarray[Any, Any]:
    """Lay a [rows, K] matrix of 8 or 16-bit values out as mma reads it: per lane, words in register order."""
    width = per_word * 4
    words = []
    for lane in range(32):
        group, part = divmod(lane, 4)
        words += [
            matrix[group + 8 * r, half * width + part * per_word :][:per_word].tobytes()
            for half in range(2)
            for r in range(rows // 8)
        ]
    return np.frombuffer(b"".join(words), np.uint32).copy()


@pytest.mark.parametrize(
    ("kernel", "dtype", "depth"),
    [("v4_test_mma_bf16", ml_dtypes.bfloat16, 16), ("v4_test_mma_e4m3", ml_dtypes.float8_e4m3fn, 32)],
)
def test_mma_multiplies_as_the_ptx_manual_lays_it_out(kernel: str, dtype: Any, depth: int) -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(size=(16, depth)).astype(dtype), random.normal(size=(8, depth)).astype(dtype)
    d = np.empty((32, 4), np.float32)
    left = fragments(a, 16, 4 // a.itemsize)
    right = fragments(b, 8, 4 // b.itemsize)
    launch(f"lane.{kernel}", left, right, d)
    want = a.astype(np.float32) @ b.astype(np.float32).T + 1
    got = np.empty((16, 8), np.float32)
    for lane in range(32):
        for i in range(4):
            got[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = d[lane, i]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_ldmatrix_hands_out_rows_and_columns() -> None:
    matrices = Guarded(512).view((4, 8, 8), np.uint16)
    matrices[:] = np.arange(256).reshape(4, 8, 8)
    plain, turned = np.empty((32, 4), np.uint32), np.empty((32, 4), np.uint32)
    launch("lane.v4_test_ldmatrix", matrices, plain, turned, shared=512)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for m in range(4):
            assert plain[lane, m] == int(matrices[m, row, column]) + (int(matrices[m, row, column + 1]) << 16)
            assert turned[lane, m] == int(matrices[m, column, row]) + (
                int(matrices[m, column + 1, row]) << 16
            )


def test_collectives_exchange_between_lanes() -> None:
    mine, lanes = np.arange(32, dtype=np.int32)[::-1].copy(), np.arange(32)
    out = np.empty((6, 32), np.int32)
    launch("lane.v4_test_collectives", mine, out)
    np.testing.assert_array_equal(out[0], mine[lanes ^ 5])
    np.testing.assert_array_equal(out[1], np.full(32, mine[7]))
    np.testing.assert_array_equal(out[2], mine[np.where(lanes < 3, lanes, lanes - 3)])
    np.testing.assert_array_equal(out[3], mine[np.where(lanes > 28, lanes, lanes + 3)])
    assert (out[4].view(np.uint32) == 0x55555555).all()
    assert (out[5] == 1).all()


def outcome(kernel: str, seed: int) -> str:
    """Run a kernel of `mistakes` on guarded memory: "right", "wrong", or the emulator's sentence."""
    threads = compile_unit("mistakes", UNITS).entries[kernel].threads
    totals = "barrier" in kernel
    source, target = Guarded(4 * threads if totals else 128), Guarded(4 if totals else 128)
    numbers = np.resize(FROM, threads) if totals else FROM
    source.view(numbers.shape, "f4")[:] = numbers
    want = numbers.sum(keepdims=True) if totals else FROM
    values = [ctypes.c_void_p(source.address), ctypes.c_void_p(target.address)]
    shared = {"barrier": 512, "wait": 128, "shared": 128, "start": 128}.get(kernel.split("_")[-1], 0)
    try:
        Emulator(seed, sources=UNITS).run(
            Launch(f"mistakes.{kernel}", (1, 1, 1), threads, shared, ()), values, 0
        )
    except EngineError as error:
        return str(error)
    return "right" if np.array_equal(target.view(want.shape, "f4"), want) else "wrong"


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("barrier", "wrong"),
        ("wait", "wrong"),
        ("start", "wrong"),
        ("index", r"v4_wrong_index, block \(0, 0, 0\), thread 31: an access to memory that is not there"),
        ("shared", r"v4_wrong_shared, .*, thread 31: an access outside shared memory, at byte 128$"),
        (
            "divergence",
            r"40 threads wait at __syncthreads, a warp waits at __syncwarp for threads that never",
        ),
        ("shuffle", r"a warp waits at __shfl_xor_sync for threads that never come"),
        ("alignment", r"v4_wrong_alignment, .*: a misaligned access"),
    ],
)
def test_a_mistake_is_noticed_and_its_right_twin_passes(mistake: str, found: str) -> None:
    assert {outcome(f"v4_right_{mistake}", seed) for seed in SEEDS} == {"right"}
    outcomes = {outcome(f"v4_wrong_{mistake}", seed) for seed in SEEDS}
    assert any(re.search(found, text) for text in outcomes), outcomes


def planted(folder: Path, file: str, edit: Callable[[str], str]) -> Path:
    """Copy the kernels with one file changed."""
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("bundle", "emulator"))
    source = (folder / file).read_text()
    changed = edit(source)
    assert changed != source, "the line to break is not there any more"
    (folder / file).write_text(changed)
    return folder


def first_case(text: str) -> KernelCase:
    return next(case for case in ALL_CASES if text in str(case))


@pytest.mark.parametrize(
    ("file", "line", "instead", "case"),
    [
        # The barrier between the copy of a tile of keys and its first reader.
        ("attention.cuh", "__syncthreads();  // the tile", "// the tile", "V4SelectedAttention"),
        ("attention.cuh", "    cp_async_wait<0>();\n", "", "V4WindowAttention-S9"),
        # A key too far from the window.
        ("attention_keys.cuh", "position - keys.window + 1", "position - keys.window", "WindowAttention-S9"),
        # The same of many tokens, and a token's last tile left out.
        ("attention_wide.cu", "__syncthreads();  // the tile", "// the tile", "WindowAttention-S67-H36"),
        ("attention_wide.cuh", "count + TILE - 1) / TILE", "count) / TILE", "V4CompressedAttention-S99"),
        ("tiles.cuh", "    cp_async_wait<0>();\n", "", "V4LinearF32-S70"),
        ("compress.cuh", "= mine;\n  __syncthreads();", "= mine;", "V4Compress"),
        ("hyper.cu", "(M + 1) + row] = sum", "(M + 1) + row + 1] = sum", "V4HyperPre"),
        ("select.cuh", "wanted <= above + here", "wanted < above + here", "V4IndexTopK__quantise_1-S33"),
    ],
)  # fmt: skip
def test_a_bug_planted_in_a_real_kernel_is_noticed(
    tmp_path: Path, file: str, line: str, instead: str, case: str
) -> None:
    sources = planted(tmp_path / "kernels", file, lambda text: text.replace(line, instead, 1))
    chosen, noticed = first_case(case), 0
    for seed in SEEDS:
        try:
            check(chosen, KernelLauncher(Emulator(seed, sources=sources, cache=tmp_path / "cache")))
        except (AssertionError, EngineError):
            noticed += 1
    assert noticed, "no order of the threads shows the bug"


def test_a_source_that_does_not_compile_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text('#include "device.cuh"\nV4_KERNEL(v4_bad, 32, 1, float* x) { y = 1; }\n')
    with pytest.raises(EngineError, match=r"^bad\.cu: g\+\+ refuses it for the emulator") as found:
        Emulator(sources=tmp_path, cache=tmp_path).signature("bad.v4_bad")
    assert "was not declared in this scope" in found.value.detail


def test_unknown_units_and_kernels_are_named() -> None:
    with pytest.raises(
        EngineError, match=r"nothing\.cu: no such unit of kernels; there are lane, mistakes\."
    ):
        Emulator(sources=UNITS).signature("nothing.v4_x")
    with pytest.raises(EngineError, match=r"lane\.v4_x: no such kernel; the unit has v4_test_mma_bf16, "):
        Emulator(sources=UNITS).signature("lane.v4_x")
    with pytest.raises(EngineError, match="launched with 64 threads, compiled for 32"):
        launch("lane.v4_test_collectives", FROM, FROM, threads=64)


def test_without_a_compiler_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4graph_plugins.emulator.shutil.which", lambda _name: None)
    with pytest.raises(
        EngineError, match=r"needs g\+\+ \(12 or newer\); install it with `apt install g\+\+`"
    ):
        Emulator(sources=UNITS, cache=tmp_path).signature("lane.v4_test_collectives")
