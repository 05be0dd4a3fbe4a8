import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy_engine import CAPACITY, VOCAB, ToyWeights

from v4graph_runtime import PrefixCache, Session
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.write_behind import MOST_WAITING


@pytest.fixture
def session(engine: Path, weights: ToyWeights) -> Session:
    return Session(engine, weights, batch=2, options=OrtOptions(threads=1))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that answers nothing until the event is set."""
    answers, fsync = threading.Event(), os.fsync

    def slow(handle: int) -> None:
        assert answers.wait(10)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    yield answers
    answers.set()


def read(session: Session, cache: PrefixCache, seed: int, tokens: int = 20) -> list[int]:
    """Read a text and store its state; return a longer one."""
    text = np.random.default_rng(seed).integers(0, VOCAB, CAPACITY)
    session.reset([0])
    session.prefill(text[None, :tokens], slots=range(1))
    cache.store(session, 0)
    session.reset([0])
    return text.tolist()


def test_a_state_can_be_reused_before_it_is_on_disk(
    tmp_path: Path, session: Session, disk: threading.Event
) -> None:
    cache = PrefixCache(tmp_path)
    text = read(session, cache, 0)
    assert cache.reuse(session, 1, text) == 20
    assert not list(tmp_path.glob("*.safetensors"))
    disk.set()
    cache.flush()
    assert PrefixCache(tmp_path).stats.bytes == cache.stats.bytes > 0


def test_while_the_disk_is_behind_nothing_more_is_kept(
    tmp_path: Path, session: Session, disk: threading.Event
) -> None:
    cache = PrefixCache(tmp_path)
    for seed in range(MOST_WAITING + 3):
        read(session, cache, seed)
    assert cache.stats.entries == MOST_WAITING
    disk.set()
    cache.flush()
    read(session, cache, 99)
    cache.flush()
    assert cache.stats.entries == len(list(tmp_path.iterdir())) == MOST_WAITING + 1


def test_what_goes_before_it_is_written_leaves_no_file(
    tmp_path: Path, session: Session, disk: threading.Event
) -> None:
    # Room for one as it is in memory; its file is larger, by the header.
    cache = PrefixCache(tmp_path, max_bytes=2500)
    for seed in range(8):
        read(session, cache, seed)
    disk.set()
    cache.flush()
    assert cache.stats.entries == len(list(tmp_path.iterdir())) <= 1
    assert cache.stats.bytes <= 2500
