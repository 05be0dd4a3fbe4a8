"""Processes that are killed while they keep states: what they leave is whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy_engine import CAPACITY, VOCAB, ToyWeights, logits_of
from toy_schedules import TOLERANCE

from v4graph_runtime import PrefixCache, Session, Snapshot
from v4graph_runtime.ort_backend import OrtOptions

ROOT = Path(__file__).parents[2]
ONE_THREAD = OrtOptions(threads=1)

# Saves one snapshot after the other under one name; each says which it is.
SNAPSHOT_WRITER = """
import dataclasses
import sys
import numpy as np
from pathlib import Path
from v4graph_runtime import Snapshot
first = Snapshot.from_bytes(Path(sys.argv[1]).read_bytes())
for turn in range(1, 10**9):
    state = dataclasses.replace(first.state, highest=first.state.highest + turn)
    dataclasses.replace(first, state=state).save(sys.argv[2])
    if turn == 1:
        print("ready", flush=True)
"""

# Reads texts and keeps their states, as fast as it can, with little room.
SEGMENT_WRITER = """
import sys
import numpy as np
sys.path[:0] = [sys.argv[3]]
from toy_engine import ToyWeights, VOCAB
from v4graph_runtime import OrtOptions, PrefixCache, Session
session = Session(sys.argv[1], ToyWeights.random(), options=OrtOptions(threads=1))
cache = PrefixCache(sys.argv[2], max_bytes=200_000)
random = np.random.default_rng()
stored = 0
while True:
    text = np.random.default_rng(random.integers(3)).integers(0, VOCAB, 64)
    text[random.integers(64):] = random.integers(0, VOCAB)
    at = cache.reuse(session, 0, text)
    while at < 64:
        step = min(int(random.integers(1, 20)), 64 - at)
        session.prefill(text[None, at:at + step])
        at += step
        cache.store(session, 0)
        if not stored:
            cache.flush()
            print("ready", flush=True)
        stored += 1
"""


def kill_after(seconds: float, writer: str, *arguments: object) -> None:
    """Start a process that writes and says when it is ready, and end it without a chance to tidy up."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "runtime"))
    child = subprocess.Popen(
        [sys.executable, "-c", writer, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()


# The slow ones kill more often.
OFTEN = pytest.mark.slow


@pytest.mark.parametrize("times", [4, pytest.param(12, marks=OFTEN)])
def test_a_snapshot_is_whole(
    all_logits_engine: Path, weights: ToyWeights, tmp_path: Path, times: int
) -> None:
    session = Session(all_logits_engine, weights, options=ONE_THREAD)
    session.prefill(np.random.default_rng(2).integers(0, VOCAB, (1, 20)))
    taken, target = session.snapshot(), tmp_path / "saved"
    (tmp_path / "image").write_bytes(taken.to_bytes())
    delays = random.Random(3)
    for _ in range(times):
        kill_after(delays.uniform(0.0, 0.05), SNAPSHOT_WRITER, tmp_path / "image", target)
        found = Snapshot.load(target)
        assert found.tokens.tolist() == taken.tokens.tolist()
        assert found.state.highest > taken.state.highest


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=OFTEN)])
def test_a_prefix_cache_loads_and_is_right(
    all_logits_engine: Path, weights: ToyWeights, tmp_path: Path, times: int
) -> None:
    session = Session(all_logits_engine, weights, options=ONE_THREAD)
    delays = random.Random(5)
    reused = 0
    for _ in range(times):
        support = ROOT / "tests" / "support"
        kill_after(delays.uniform(0.0, 0.2), SEGMENT_WRITER, all_logits_engine, tmp_path, support)
        cache = PrefixCache(tmp_path, max_bytes=200_000)
        for seed in range(3):
            text = np.random.default_rng(seed).integers(0, VOCAB, CAPACITY)
            session.reset()
            at = cache.reuse(session, 0, text)
            np.testing.assert_allclose(
                session.prefill(text[None, at:])[0], logits_of(text, weights)[at:], atol=TOLERANCE
            )
        reused += cache.stats.tokens_reused
        assert cache.stats.ignored == 0
    assert reused
