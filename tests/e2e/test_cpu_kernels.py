"""Models on the native CPU kernels: the same bits for any schedule, and bounded memory for long prompts."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from agreement import agreement
from engines import NANO, Built, export_and_build

from v4graph_export import ExportOptions
from v4graph_runtime import Session, cpu_kernels
from v4graph_runtime.ort_backend import OrtOptions

LONG = 65_536
# Bytes that a process may have at once while it prefills 64K tokens of nano: in pieces of 4,096 (711 MB on
# 2 cores), and in one (4.3 GB: activations; scores of every token for every token would be 17 GB per head).
PEAK_IN_PIECES, PEAK_IN_ONE = 1_000_000_000, 6_000_000_000


@pytest.fixture(scope="module", autouse=True)
def library() -> None:
    cpu_kernels.build_library(cpu_kernels.find_compiler())


def run(built: Built, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
    session = Session(built.engine, NANO)
    edges = np.cumsum([0, *pieces])
    parts = [session.prefill(ids[:, a:b]) for a, b in itertools.pairwise(edges)]
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("kind", ["nano_v4", "nano_exact"])
def test_any_schedule_gives_the_same_bits(kind: str, request: pytest.FixtureRequest) -> None:
    built = request.getfixturevalue(kind)
    ids = np.random.default_rng(1).integers(0, 1280, (1, 400))
    whole = run(built, ids, [400])
    np.testing.assert_array_equal(run(built, ids, [1] * 400), whole)
    np.testing.assert_array_equal(run(built, ids, [37, 1, 200, 2, 5, 155]), whole)


@pytest.mark.parametrize("isa", list(cpu_kernels.SETS))
def test_every_instruction_set_keeps_the_bits(
    isa: str, nano_v4: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in cpu_kernels.instruction_sets(cpu_kernels.open_library(cpu_kernels.LIBRARY)):
        pytest.skip(f"this machine does not run {isa}")
    monkeypatch.setenv(cpu_kernels.ISA_VARIABLE, isa)
    ids = np.random.default_rng(4).integers(0, 1280, (1, 150))
    np.testing.assert_array_equal(run(nano_v4, ids, [1] * 20 + [130]), run(nano_v4, ids, [150]))


def test_a_slot_of_a_ragged_batch_and_a_replay_give_the_same_bits(nano_v4: Built) -> None:
    ids = np.random.default_rng(2).integers(0, 1280, (3, 160))
    alone = run(nano_v4, ids[1:2], [160])
    session = Session(nano_v4.engine, NANO, batch=3)
    first = session.prefill(ids[:, :100], num_tokens=[100, 100, 37])
    session.prefill(ids[:, 100:105], num_tokens=[0, 5, 3])
    session.rollback([0, 5, 0])
    second = session.prefill(ids[:, 100:], num_tokens=[60, 60, 0])
    np.testing.assert_array_equal(np.concatenate([first[1:2], second[1:2]], 1), alone)


def test_kernels_and_bodies_agree(nano_v4: Built) -> None:
    ids = np.random.default_rng(3).integers(0, 1280, (1, 300))
    bodies = Session(nano_v4.engine, NANO, options=OrtOptions(kernels=False)).prefill(ids)
    kernels = run(nano_v4, ids, [300])
    assert not np.array_equal(kernels, bodies), "the kernels did not run"
    same = agreement(kernels, bodies)
    assert same.mean_kl <= 1e-3
    assert same.argmax >= 0.98


_PREFILL = """
import resource, sys
import numpy as np
from v4graph_runtime import Session
ids = np.random.default_rng(5).integers(0, 1280, (1, int(sys.argv[3])))
session = Session(sys.argv[1], sys.argv[2], prefill_chunk=int(sys.argv[4]))
step = session.prefill_chunk
for at in range(0, ids.shape[1], step):
    logits = session.prefill(ids[:, at : at + step])
np.save(sys.argv[5], logits)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_64k_tokens_need_bounded_memory_and_equal_chunks(tmp_path: Path) -> None:
    engine = export_and_build(tmp_path, NANO, ExportOptions(max_seq_len=LONG))
    peaks, logits = {}, {}
    for step in (LONG, 4_096):
        out = tmp_path / f"{step}.npy"
        command = [sys.executable, "-c", _PREFILL, engine, NANO, LONG, step, out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        peaks[step], logits[step] = int(done.stdout), np.load(out)
    print(f"\npeak memory: {peaks[LONG] / 1e6:.0f} MB in one piece, {peaks[4_096] / 1e6:.0f} MB in chunks")
    np.testing.assert_array_equal(logits[LONG], logits[4_096])
    assert peaks[4_096] < PEAK_IN_PIECES
    assert peaks[LONG] < PEAK_IN_ONE
