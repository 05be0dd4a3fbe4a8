"""Prefix reuse: what comes back, what goes when room is short, and what a directory may do to it."""

import os
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import CAPACITY, SLACK, VOCAB, ToyWeights, logits_of
from toy_schedules import TOLERANCE
from toy_trt import ToyMachine, write_engine

from v4graph.errors import SessionError
from v4graph_runtime import PrefixCache, Session
from v4graph_runtime.ort_backend import OrtOptions

ONE_THREAD = OrtOptions(threads=1)
TEXT = np.random.default_rng(11).integers(0, VOCAB, CAPACITY)


def branch(at: int, seed: int = 1) -> Any:
    """TEXT up to a position, and then another text."""
    other = np.random.default_rng(seed).integers(0, VOCAB, CAPACITY)
    other[:at] = TEXT[:at]
    other[at] = (TEXT[at] + 1) % VOCAB
    return other


@pytest.fixture
def session(all_logits_engine: Path, weights: ToyWeights) -> Session:
    return Session(all_logits_engine, weights, batch=2, options=ONE_THREAD)


@pytest.fixture
def fresh(all_logits_engine: Path, weights: ToyWeights) -> Session:
    return Session(all_logits_engine, weights, batch=2, options=ONE_THREAD)


@pytest.fixture(params=["memory", "folder"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> PrefixCache:
    return PrefixCache(tmp_path / "cache" if request.param == "folder" else None)


def feed(session: Session, slot: int, tokens: Any) -> Any:
    """Append tokens to one slot; return their logits."""
    return session.prefill(np.asarray(tokens)[None], slots=range(slot, slot + 1))[0]


def fill(cache: PrefixCache, session: Session, text: Any, ends: list[int], slot: int = 0) -> None:
    """Read a text and keep its state at some positions."""
    session.reset([slot])
    for start, end in zip([0, *ends], ends, strict=False):
        feed(session, slot, text[start:end])
        cache.store(session, slot)
    cache.flush()


def check(session: Session, slot: int, text: Any, weights: ToyWeights) -> None:
    """The rest of a text after what is in a slot gives the logits of the whole text."""
    at = int(session.position[slot])
    assert session.tokens(slot).tolist() == text[:at].tolist()
    np.testing.assert_allclose(feed(session, slot, text[at:]), logits_of(text, weights)[at:], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (TEXT[:40], 30),  # the longest that is kept
        (TEXT[:31], 30),
        (TEXT[:30], 29),  # its last token has to be run: one back
        (TEXT[:28], 27),  # as far back as it goes
        (TEXT[:27], 20),
        (branch(29), 29),
        (branch(27), 27),
        (branch(26), 20),
        (branch(20), 20),
        (branch(10), 10),
        (branch(6), 0),
    ],
    ids=["inside", "all_but_one", "one_back", "three_back", "too_far", *"abcdef"],
)
def test_the_longest_known_prefix_comes_back(
    cache: PrefixCache, session: Session, fresh: Session, weights: ToyWeights, text: Any, length: int
) -> None:
    fill(cache, session, TEXT, [10, 20, 30])
    feed(fresh, 1, branch(0, 3)[:12])
    assert cache.reuse(fresh, 1, text.tolist()) == length == fresh.position[1]
    check(fresh, 1, text, weights)
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.tokens_reused) == (int(length > 0), int(length == 0), length)
    assert (stats.entries, stats.ignored) == (3, 0)


def test_bytes_grow_with_the_text_not_with_its_square(cache: PrefixCache, session: Session) -> None:
    sizes = [0]
    for end in range(8, CAPACITY + 1, 8):
        fill(cache, session, TEXT, list(range(8, end + 1, 8)))
        sizes.append(cache.stats.bytes)
    steps = np.diff(sizes)
    assert cache.stats.entries == CAPACITY // 8
    assert steps[-1] <= steps[1] + 8


def test_what_is_kept_is_not_kept_again(cache: PrefixCache, session: Session) -> None:
    fill(cache, session, TEXT, [10, 20])
    before = cache.stats
    fill(cache, session, TEXT, [10, 20])
    fill(cache, session, TEXT, [20])
    assert cache.stats == before


def test_texts_share_their_beginning(cache: PrefixCache, session: Session, fresh: Session) -> None:
    fill(cache, session, TEXT, [16, 40])
    fill(cache, session, branch(16), [16, 40])
    assert cache.stats.entries == 3
    for text in (TEXT, branch(16)):
        assert cache.reuse(fresh, 0, text[:60]) == 40


def test_the_slots_own_state_comes_first(
    cache: PrefixCache, session: Session, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(session, 0, TEXT[:20])
    monkeypatch.setattr(session, "restore", None)
    assert cache.reuse(session, 0, TEXT[:30]) == 20
    assert cache.reuse(session, 0, TEXT[:20]) == 19
    assert cache.reuse(session, 0, branch(18)) == 18
    check(session, 0, branch(18), weights)


def test_another_slot_is_forked_before_the_cache_is_asked(
    cache: PrefixCache, session: Session, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(session, 0, TEXT[:20])
    cache.store(session, 0)
    with monkeypatch.context() as patch:
        patch.setattr(session, "restore", None)
        assert cache.reuse(session, 1, branch(18)) == 18
    check(session, 1, branch(18), weights)
    assert session.tokens(0).tolist() == TEXT[:20].tolist()
    # What the cache has is longer than what a slot has.
    session.reset([0])
    feed(session, 0, TEXT[:5])
    assert cache.reuse(session, 0, TEXT[:30]) == 20


def test_without_movable_states_only_the_slot_itself_is_used(
    cache: PrefixCache, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(session, 0, TEXT[:20])
    monkeypatch.setattr(session._backend, "movable_states", False)
    cache.store(session, 0)
    assert cache.stats.entries == 0
    assert cache.reuse(session, 0, branch(18)) == 18
    assert cache.reuse(session, 1, branch(18)) == 0


@pytest.mark.parametrize("prompt", [[], [3]])
def test_a_prompt_without_a_prefix_empties_the_slot(
    cache: PrefixCache, session: Session, prompt: list[int]
) -> None:
    feed(session, 0, TEXT[:5])
    assert cache.reuse(session, 0, prompt) == 0
    assert session.position.tolist() == [0, 0]
    cache.store(session, 0)
    assert cache.stats.entries == 0


def test_a_state_that_went_back_is_kept_with_how_far_it_goes(
    cache: PrefixCache, session: Session, fresh: Session, weights: ToyWeights
) -> None:
    feed(session, 0, TEXT[:20])
    session.rollback([2, 0])
    cache.store(session, 0)
    assert cache.reuse(fresh, 0, branch(17)) == 17
    check(fresh, 0, branch(17), weights)
    fresh.reset()
    assert cache.reuse(fresh, 0, branch(16)) == 0


def test_other_weights_and_other_engines_share_a_cache_without_meeting(
    cache: PrefixCache, session: Session, all_logits_engine: Path
) -> None:
    other = Session(all_logits_engine, ToyWeights.random(5), options=ONE_THREAD)
    fill(cache, session, TEXT, [20])
    assert cache.reuse(other, 0, TEXT[:30]) == 0
    fill(cache, other, TEXT, [20])
    assert cache.stats.entries == 2
    assert cache.reuse(other, 0, TEXT[:30]) == 20


def test_a_directory_outlives_the_process(
    tmp_path: Path, session: Session, fresh: Session, weights: ToyWeights
) -> None:
    fill(PrefixCache(tmp_path), session, TEXT, [10, 20, 30])
    again = PrefixCache(tmp_path)
    assert again.stats.entries == 3
    assert again.stats.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert again.reuse(fresh, 0, branch(19)) == 19
    check(fresh, 0, branch(19), weights)
    tensors = safetensors.numpy.load(next(tmp_path.iterdir()).read_bytes())
    assert tensors["appended/state.0.compressed"].shape == (10, 8)


def test_opening_reads_no_rows(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(PrefixCache(tmp_path), session, TEXT, [10, 20])
    names = []
    read = np.frombuffer

    def seen(data: Any, *rest: Any) -> Any:
        names.append(len(data))
        return read(data, *rest)

    monkeypatch.setattr(np, "frombuffer", seen)
    PrefixCache(tmp_path)
    assert names == [4 * 10] * 2


def one_size(session: Session, tmp_path: Path) -> int:
    probe = PrefixCache(tmp_path / "probe")
    fill(probe, session, TEXT, [10])
    return probe.stats.bytes


def test_the_longest_unused_leaf_goes_first_and_parents_stay(
    tmp_path: Path, session: Session, fresh: Session
) -> None:
    room = int(3.5 * one_size(session, tmp_path))
    cache = PrefixCache(tmp_path / "cache", max_bytes=room)
    fill(cache, session, TEXT, [10, 20])
    fill(cache, session, branch(5), [10])
    # The first text's root is older than all, but has a child; its leaf is used now.
    assert cache.reuse(fresh, 0, TEXT[:21]) == 20
    fill(cache, session, branch(2), [10])
    assert cache.stats.bytes <= room
    lengths = [cache.reuse(fresh, 1, text[:21]) for text in (branch(5), branch(2))]
    fresh.reset()
    assert [*lengths, cache.reuse(fresh, 0, TEXT[:21])] == [0, 10, 20]


def test_the_order_of_use_outlives_the_process(tmp_path: Path, session: Session, fresh: Session) -> None:
    size = one_size(session, tmp_path)
    folder = tmp_path / "cache"
    cache = PrefixCache(folder)
    for seed in range(4):
        fill(cache, session, branch(0, seed), [10])
    assert cache.reuse(fresh, 0, branch(0, 0)[:11]) == 10
    smaller = PrefixCache(folder, max_bytes=int(2.5 * size))
    assert smaller.stats.entries == len(list(folder.iterdir())) == 2
    found = []
    for seed in range(4):
        fresh.reset()
        found.append(smaller.reuse(fresh, 0, branch(0, seed)[:11]))
    assert found == [10, 0, 0, 10]


def test_what_is_larger_than_the_cache_is_not_kept(tmp_path: Path, session: Session) -> None:
    cache = PrefixCache(tmp_path / "cache", max_bytes=1000)
    fill(cache, session, TEXT, [10])
    assert cache.stats.entries == 0
    with pytest.raises(SessionError, match="max_bytes is 0, expected at least 1"):
        PrefixCache(max_bytes=0)
    with pytest.raises(SessionError, match="interval is 0"):
        PrefixCache(interval=0)


def test_a_text_that_outgrows_the_cache_keeps_its_beginning(
    tmp_path: Path, session: Session, fresh: Session
) -> None:
    cache = PrefixCache(tmp_path / "cache", max_bytes=int(2.5 * one_size(session, tmp_path)))
    fill(cache, session, TEXT, [10, 20, 30, 40])
    assert cache.stats.entries == 2
    assert cache.reuse(fresh, 0, TEXT) == 20


def files(folder: Path) -> list[Path]:
    """The files of a chain, its root first."""
    nodes = PrefixCache(folder)._tree.nodes.values()
    return [folder / f"{node.key}.safetensors" for node in sorted(nodes, key=lambda node: node.segment.end)]


def test_files_that_are_no_segments_are_left_alone_and_told(
    tmp_path: Path, session: Session, fresh: Session, caplog: pytest.LogCaptureFixture
) -> None:
    fill(PrefixCache(tmp_path), session, TEXT, [10])
    (whole,) = tmp_path.iterdir()
    data = whole.read_bytes()
    session.snapshot(0).save(tmp_path / "snapshot.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(data[:-5])
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("what these files are")
    (tmp_path / ("0" * 64 + ".safetensors")).write_bytes(data)
    (tmp_path / "folder").mkdir()
    (tmp_path / ".one.partial").write_bytes(data[:9])
    (tmp_path / ".two.partial").write_bytes(data[:9])
    os.utime(tmp_path / ".two.partial", (0, 0))
    cache = PrefixCache(tmp_path)
    assert (cache.stats.entries, cache.stats.ignored) == (1, 6)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 6
    assert all(text.startswith(f"prefix cache: ignored: {tmp_path}") or "Is a dir" in text for text in told)
    assert len(list(tmp_path.iterdir())) == 8
    assert not (tmp_path / ".two.partial").exists()
    assert cache.reuse(fresh, 0, TEXT[:20]) == 10


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_segment_is_a_miss_that_is_told_once(
    tmp_path: Path,
    session: Session,
    fresh: Session,
    weights: ToyWeights,
    caplog: pytest.LogCaptureFixture,
    which: int,
) -> None:
    fill(PrefixCache(tmp_path), session, TEXT, [10, 20, 30])
    path = files(tmp_path)[which + 1]
    data = bytearray(path.read_bytes())
    # The first of the tensors' bytes: cache rows, which sort before the rings.
    data[8 + int.from_bytes(data[:8], "little")] ^= 0x40
    path.write_bytes(data)
    cache = PrefixCache(tmp_path)
    assert (cache.stats.entries, cache.stats.ignored) == (3, 0)
    length = 10 * (which + 1)
    assert cache.reuse(fresh, 0, TEXT[:40]) == length
    check(fresh, 0, TEXT[:40], weights)
    assert (cache.stats.entries, cache.stats.ignored) == (which + 1, 1)
    assert "the checksum of its part 'appended' differs" in caplog.text
    assert len(list(tmp_path.iterdir())) == which + 1
    fill(cache, session, TEXT, [10, 20, 30])
    assert cache.reuse(fresh, 1, TEXT[:40]) == 39
    fresh.reset()
    assert cache.reuse(fresh, 1, TEXT[:40]) == 30


def test_every_flipped_byte_is_a_miss_or_harmless(
    tmp_path: Path, session: Session, fresh: Session, weights: ToyWeights
) -> None:
    fill(PrefixCache(tmp_path / "good"), session, TEXT, [10])
    (path,) = (tmp_path / "good").iterdir()
    data = path.read_bytes()
    for at in range(0, len(data), 9):
        folder = tmp_path / "bad"
        folder.mkdir()
        bad = bytearray(data)
        bad[at] ^= 0x11
        (folder / path.name).write_bytes(bad)
        fresh.reset()
        if PrefixCache(folder).reuse(fresh, 0, TEXT[:12]):
            check(fresh, 0, TEXT[:12], weights)
        shutil.rmtree(folder)


def test_two_caches_on_one_directory_do_not_break_each_other(
    tmp_path: Path, session: Session, fresh: Session, weights: ToyWeights, caplog: pytest.LogCaptureFixture
) -> None:
    one = PrefixCache(tmp_path)
    fill(one, session, TEXT, [10, 20, 30])
    two = PrefixCache(tmp_path)
    fill(one, session, branch(20), [10, 20, 30])
    fill(two, session, branch(20), [10, 20, 30])
    assert len(list(tmp_path.iterdir())) == one.stats.entries == two.stats.entries == 4
    # The one lets everything go while the other counts on it.
    PrefixCache(tmp_path, max_bytes=1)
    assert list(tmp_path.iterdir()) == []
    assert one.reuse(fresh, 0, TEXT[:31]) == 0
    # Nor does it write what would follow on nothing.
    fill(two, session, TEXT, [30, 40])
    assert two.reuse(fresh, 0, TEXT[:60]) == 40
    check(fresh, 0, TEXT[:60], weights)
    assert PrefixCache(tmp_path).stats.entries == two.stats.entries == 2
    assert caplog.text == ""


def test_a_segment_whose_parent_is_gone_is_removed(tmp_path: Path, session: Session) -> None:
    fill(PrefixCache(tmp_path), session, TEXT, [10, 20, 30])
    files(tmp_path)[0].unlink()
    cache = PrefixCache(tmp_path)
    assert (cache.stats.entries, cache.stats.ignored) == (0, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_once_and_the_cache_goes_on(
    tmp_path: Path,
    session: Session,
    fresh: Session,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = PrefixCache(tmp_path)
    fill(cache, session, TEXT, [10])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fill(cache, session, TEXT, [20, 30])
        patch.setattr("v4graph_runtime.prefix_cache.RETRY_S", 0.0)
        cache._closed_until = 0.0
        fill(cache, session, TEXT, [20, 30])
    assert [record.getMessage() for record in caplog.records] == [
        "prefix cache: nothing can be kept ([Errno 28] No space left on device); going on without"
    ]
    assert cache.reuse(fresh, 0, TEXT[:40]) == 10
    assert len(list(tmp_path.iterdir())) == 1
    # There is room again.
    fill(cache, session, TEXT, [20])
    assert cache.stats.entries == 2


def test_a_directory_that_cannot_be_made_is_told_once(
    tmp_path: Path, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = PrefixCache(tmp_path / "file" / "cache")
    fill(cache, session, TEXT, [10, 20])
    assert cache.stats.entries == 0
    assert len(caplog.records) == 1
    assert "cannot be used" in caplog.text
    assert cache.reuse(session, 0, TEXT[:21]) == 20


def test_a_state_beyond_the_capacity_is_not_used(
    cache: PrefixCache, session: Session, fresh: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(cache, session, TEXT, [10, 20])
    monkeypatch.setattr(fresh._positions, "capacity", 19)
    assert cache.reuse(fresh, 0, branch(19)) == 10


def test_threads_share_a_cache(tmp_path: Path, all_logits_engine: Path, weights: ToyWeights) -> None:
    cache = PrefixCache(tmp_path, max_bytes=60_000)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            own = Session(all_logits_engine, weights, batch=1, options=ONE_THREAD)
            draw = random.Random(seed)
            for _ in range(12):
                text = branch(draw.randrange(0, 40), draw.randrange(3))[: draw.randrange(2, CAPACITY)]
                cache.reuse(own, 0, text)
                check(own, 0, text, weights)
                cache.store(own, 0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


Step = tuple[int, int, int, int, int]


def replay(cache: PrefixCache, session: Session, steps: list[Step], weights: ToyWeights) -> PrefixCache:
    """Read prompts that branch off one text, with a reuse before and stores while they are read."""
    for slot, at, length, chunk, back in steps:
        text = branch(at % CAPACITY, at % 3)[:length]
        before = cache.stats
        got = cache.reuse(session, slot, text)
        assert got < length
        assert cache.stats.tokens_reused == before.tokens_reused + got
        want = logits_of(text, weights)
        for start in range(got, length, chunk):
            piece = text[start : start + chunk]
            np.testing.assert_allclose(
                feed(session, slot, piece), want[start : start + chunk], atol=TOLERANCE
            )
            cache.store(session, slot)
        counts = np.zeros(session.batch, np.int64)
        counts[slot] = min(back, session.rollback_limit(slot))
        session.rollback(counts)
        cache.store(session, slot)
    return cache


STEPS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from([0, 3, 20, 21, 22, 23, 24, 40, 41, 63]),
        st.integers(2, CAPACITY),
        st.sampled_from([3, 8, 13, CAPACITY]),
        st.integers(0, SLACK),
    ),
    min_size=2,
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(
    steps=STEPS, kind=st.sampled_from(["memory", "folder", "reopened"]), room=st.sampled_from([25, 10_000])
)
def test_any_prompts_through_a_cache_give_the_same_logits(
    steps: list[Step],
    kind: str,
    room: int,
    all_logits_engine: Path,
    weights: ToyWeights,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    session = Session(all_logits_engine, weights, batch=2, options=ONE_THREAD)
    folder = None if kind == "memory" else tmp_path_factory.mktemp("cache")
    cache = PrefixCache(folder, max_bytes=room * 1000)
    for step in steps:
        if kind == "reopened":
            cache.flush()
            cache = PrefixCache(folder, max_bytes=room * 1000)
        replay(cache, session, [step], weights)
        assert cache.stats.bytes <= room * 1000
    assert cache.stats.ignored == 0


@settings(max_examples=5, deadline=None)
@given(steps=STEPS)
def test_any_prompts_through_a_cache_in_tensorrt(
    steps: list[Step], weights: ToyWeights, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = write_engine(tmp_path_factory.mktemp("trt") / "engine", all_logits=True)
    with pytest.MonkeyPatch.context() as patch:
        ToyMachine.of(engine).install(patch)
        with Session(engine, weights, batch=2) as session:
            replay(PrefixCache(), session, steps, weights)
