"""Models on the native CPU kernels: the same bits for any schedule, and bounded memory for long prompts."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from agreement import agreement
from engines import NANO, Built, export_and_build

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import pack
from v4graph.config import OFFICIAL, UNQUANTISED, WeightFormat
from v4graph.manifest import Manifest, Numerics
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


def widened(checkpoint: Path, out: Path) -> Path:
    """Write a checkpoint with its plain matrices in float32."""
    source = Checkpoint.open(checkpoint)
    arrays = {name: source.array(name) for name in source.tensors}
    wide = {
        name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.name == "bfloat16"
    }
    tiny.write(out, {**arrays, **wide}, (checkpoint / "config.json").read_text())
    return out


@pytest.mark.parametrize(
    ("weights", "numerics"), [(OFFICIAL, "v4"), (OFFICIAL, "exact"), (UNQUANTISED, "exact")]
)
def test_bfloat16_weights_give_the_bits_of_float32_copies(
    tmp_path: Path, weights: WeightFormat, numerics: Numerics
) -> None:
    init(tiny.config(), tmp_path / "bf16", seed=7, weights=weights)
    pack(tmp_path / "bf16", tmp_path / "packed")
    options = ExportOptions(numerics=numerics, max_seq_len=256, all_logits=True)
    ids = np.random.default_rng(6).integers(0, tiny.RAW["vocab_size"], (2, 150))
    narrow = export_and_build(tmp_path / "narrow", tmp_path / "bf16", options)
    wide = export_and_build(tmp_path / "wide", widened(tmp_path / "bf16", tmp_path / "fp32"), options)
    dtypes = [{b.dtype for b in Manifest.load(engine).bindings} for engine in (narrow, wide)]
    assert dtypes[0] - dtypes[1] == {"bfloat16"}
    want = Session(wide, tmp_path / "fp32", batch=2).prefill(ids)
    for source in ("bf16", "packed"):
        np.testing.assert_array_equal(Session(narrow, tmp_path / source, batch=2).prefill(ids), want)
    steps = Session(narrow, tmp_path / "bf16", batch=2)
    np.testing.assert_array_equal(
        np.concatenate([steps.decode(ids[:, at]).reshape(2, 1, -1) for at in range(150)], 1), want
    )


_ANONYMOUS = """
import sys
import numpy as np
from pathlib import Path
from v4graph_runtime import Session
from v4graph_runtime.ort_backend import OrtOptions
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
Session(sys.argv[1], sys.argv[2]).prefill(np.array([[1, 2]]))
before = anonymous()
session = Session(sys.argv[3], sys.argv[4], options=OrtOptions(threads=2))
session.prefill(np.array([[1, 2, 3, 4, 5]]))
session.decode(np.array([6]))
print(anonymous() - before)
"""


@pytest.mark.parametrize("packed", [False, True], ids=["original", "packed"])
def test_bfloat16_weights_are_not_copied(tmp_path: Path, packed: bool) -> None:
    """A second session, on a model that differs from the first in a large vocabulary only, adds little."""
    vocabulary = 200_000
    sides = []
    for size in (40, vocabulary):
        folder = tmp_path / str(size)
        init(tiny.config(vocab_size=size), folder / "original", seed=8, weights=UNQUANTISED)
        pack(folder / "original", folder / "packed")
        checkpoint = folder / ("packed" if packed else "original")
        options = ExportOptions(numerics="exact", max_seq_len=128)
        sides += [export_and_build(folder, checkpoint, options), checkpoint]
    command = [sys.executable, "-c", _ANONYMOUS, *map(str, sides)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = vocabulary * tiny.RAW["hidden_size"] * 2
    print(f"\n{int(done.stdout) / 1e6:.1f} MB of anonymous memory more, for {2 * table / 1e6:.0f} MB of bf16")
    assert int(done.stdout) < table // 4


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
