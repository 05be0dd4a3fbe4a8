"""Prompts that begin alike are read once: states at several lengths of a text, in memory or on disk.

The window and the tails of the compressors are rings, so a state goes back a few tokens only: reusing a
prefix takes a state that was kept at or just beyond it. What is kept are segments (see `segment`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from v4graph.errors import SessionError
from v4graph_runtime.arguments import integers
from v4graph_runtime.segment import Segment
from v4graph_runtime.segment_store import FolderStore, Found, MemoryStore, Store
from v4graph_runtime.segment_tree import Match, Node, SegmentTree
from v4graph_runtime.session import Session
from v4graph_runtime.slot_state import Rows, SlotState, joined
from v4graph_runtime.snapshot import Snapshot
from v4graph_runtime.state import Int32
from v4graph_runtime.write_behind import WriteBehind

logger = logging.getLogger(__name__)

# After a failed write none is tried for so long.
RETRY_S = 60.0


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was opened; `bytes` and `entries` are what it holds now.

    `ignored` are files that could not be used: torn, damaged, of another kind.
    """

    hits: int = 0
    misses: int = 0
    tokens_reused: int = 0
    bytes: int = 0
    entries: int = 0
    ignored: int = 0


class PrefixCache:
    """States of texts that were read before; several threads and, by a directory, processes may share it.

    `interval` is the number of prompt tokens after which whoever reads a prompt should `store`.
    """

    def __init__(
        self, directory: str | Path | None = None, *, max_bytes: int = 1 << 30, interval: int = 512
    ) -> None:
        """Open a directory, or keep everything in this process if it is None.

        The segments used longest ago go when there are more than `max_bytes`. Files that are no whole
        segments are left alone and reported in the log.

        Raises:
            SessionError: `max_bytes` or `interval` is not positive.
        """
        for name, value in (("max_bytes", max_bytes), ("interval", interval)):
            if value < 1:
                raise SessionError(f"{name} is {value}, expected at least 1.")
        self.interval, self._max_bytes = interval, max_bytes
        self._tree, self._stats, self._lock = SegmentTree(), CacheStats(), threading.RLock()
        self._clock, self._closed_until, self._reported = 0, 0.0, False
        self._store: Store = MemoryStore()
        if directory is not None:
            self._open(Path(directory))

    @property
    def stats(self) -> CacheStats:
        """What the cache has done and holds."""
        with self._lock:
            return replace(self._stats, bytes=self._tree.nbytes, entries=len(self._tree.nodes))

    def reuse(self, session: Session, slot: int, prompt: Sequence[int]) -> int:
        """Bring the longest known prefix of a prompt into an idle slot, and return its number of tokens.

        The prefix is shorter than the prompt: its last token has to be run for its logits. The slot's own
        state, that of other slots and what the cache holds are looked at; the slot is empty if nothing
        fits.

        Raises:
            SessionError: no such slot.
            EngineError: the backend failed; the slot is then empty.
        """
        wanted = integers("prompt", prompt).astype(np.int32)[:-1]
        with self._lock:
            length = self._bring(session, slot, wanted)
            if not length:
                session.reset([slot])
            found = {"hits": self._stats.hits + 1} if length else {"misses": self._stats.misses + 1}
            self._stats = replace(self._stats, tokens_reused=self._stats.tokens_reused + length, **found)
        return length

    def store(self, session: Session, slot: int) -> None:
        """Keep a slot's present state; what the cache has of its tokens is not kept again.

        It is copied at once and written to a directory by a thread. Nothing is kept while too many wait
        for a slow disk.

        Raises:
            SessionError: no such slot.
            EngineError: the backend failed.
        """
        tokens = session.tokens(slot)
        if not len(tokens) or not session.movable_states:
            return
        with self._lock:
            parent = self._deepest(session.contract, tokens)
            if parent is not None:
                self._touch(parent)
            if (parent is None or parent.segment.end < len(tokens)) and self._open_for_more():
                self._keep(session, slot, tokens, parent)

    def flush(self) -> None:
        """Wait until the files of all that was stored are written."""
        self._store.flush()

    def _open_for_more(self) -> bool:
        return time.monotonic() >= self._closed_until and self._store.ready()

    def _bring(self, session: Session, slot: int, wanted: Int32) -> int:
        source, live = self._live(session, slot, wanted)
        if session.movable_states and self._tree.nodes:
            for match in self._tree.matches(session.contract, wanted):
                if match.length <= live:
                    break
                if match.node.segment.end <= session.capacity and self._restore(session, slot, match):
                    return match.length
        if live:
            session.fork(source, slot)
            _take_back(session, slot, int(session.position[slot]) - live)
        return live

    def _live(self, session: Session, slot: int, wanted: Int32) -> tuple[int, int]:
        """Return the slot that holds the longest prefix, `slot` itself if it does, and the length."""
        best = (slot, 0)
        others = range(session.batch) if session.movable_states else ()
        for source in (slot, *others):
            held = session.tokens(source)
            length = _common(held, wanted)
            if length > best[1] and len(held) - length <= session.rollback_limit(source):
                best = (source, length)
        return best

    def _restore(self, session: Session, slot: int, match: Match) -> bool:
        """Bring a segment's state into a slot; return whether that worked."""
        state = self._read(match)
        if state is None:
            return False
        try:
            session.restore(Snapshot(session.state_contract, state), slot)
        except SessionError as error:
            self._drop(match.node, error)
            return False
        _take_back(session, slot, match.back)
        self._touch(match.node)
        return True

    def _read(self, match: Match) -> SlotState | None:
        """Return the state at a segment's end, joined along its chain; what cannot be used is dropped."""
        chain, pieces = match.node.chain(), list[tuple[Segment, Rows, Rows]]()
        for node in chain:
            if self._tree.nodes.get(node.key) is not node:
                return None
            try:
                pieces.append(self._store.read(node.key, rings=node is match.node))
            except FileNotFoundError:
                # Another process needed the room.
                self._drop(node, None)
                return None
            except SessionError as error:
                self._drop(node, error)
                return None
            except OSError as error:
                self._ignore(str(error))
                return None
        last, _, rings = pieces[-1]
        if last.back < match.back:
            # Another process has kept the same tokens after going back itself.
            return None
        tokens = np.concatenate([node.segment.tokens for node in chain])
        return SlotState(tokens, last.highest, rings, joined([rows for _, rows, _ in pieces]))

    def _deepest(self, contract: str, tokens: Int32) -> Node | None:
        """Return the segment that ends nearest to the end of some tokens, all of its chain still there."""
        for match in self._tree.matches(contract, tokens):
            if match.back == 0:
                gone = next((node for node in match.node.chain() if not self._store.holds(node.key)), None)
                if gone is None:
                    return match.node
                self._drop(gone, None)
        return None

    def _keep(self, session: Session, slot: int, tokens: Int32, parent: Node | None) -> None:
        start, key = (parent.segment.end, parent.key) if parent else (0, "")
        state = session.slot_state(slot, since=start)
        back = session.rollback_limit(slot)
        segment = Segment(session.contract, key, start, tokens[start:].copy(), state.highest, back)
        # The tokens before its own belong to other segments.
        own = replace(state, tokens=segment.tokens, since=0)
        if self._make_room(own.nbytes, parent):
            self._store.write(segment, own)
            self._tree.add(segment, own.nbytes, self._now())

    def _written(self, key: str, result: int | Exception) -> None:
        """Take in that a segment's file has so many bytes, or why there is none."""
        with self._lock:
            node = self._tree.nodes.get(key)
            if isinstance(result, Exception):
                self._closed_until = time.monotonic() + RETRY_S
                if not self._reported:
                    self._reported = True
                    logger.warning("prefix cache: nothing can be kept (%s); going on without", result)
                if node:
                    self._drop(node, None)
            elif node:
                self._tree.resize(node, result)
                self._store.touch(key, node.used)
                self._make_room(0, None)

    def _make_room(self, nbytes: int, parent: Node | None) -> bool:
        """Let segments go until so many bytes fit; return whether they do."""
        while self._tree.nbytes + nbytes > self._max_bytes:
            oldest = self._tree.oldest(parent)
            if oldest is None:
                return False
            self._remove(oldest)
        return True

    def _open(self, directory: Path) -> None:
        try:
            self._store = WriteBehind(FolderStore(directory), self._written)
            found = list(self._store.scan())
        except OSError as error:
            self._closed_until, self._reported = math.inf, True
            logger.warning("prefix cache: %s cannot be used (%s); going on without", directory, error)
            return
        for problem in (item for item in found if isinstance(item, str)):
            self._ignore(problem)
        # Parents first.
        for item in sorted(
            (item for item in found if isinstance(item, Found)), key=lambda i: i.segment.start
        ):
            self._clock = max(self._clock, item.used)
            lost = self._tree.add(item.segment, item.nbytes, item.used) is None
            if lost and not (item.segment.parent and self._store.holds(item.segment.parent)):
                self._store.remove(item.segment.key)
        self._make_room(0, None)

    def _drop(self, node: Node, error: SessionError | None) -> None:
        """Forget a segment that cannot be used, and with it all that follow on it."""
        if error is not None:
            self._ignore(str(error))
        for gone in self._tree.below(node):
            self._remove(gone)

    def _ignore(self, problem: str) -> None:
        self._stats = replace(self._stats, ignored=self._stats.ignored + 1)
        logger.warning("prefix cache: ignored: %s", problem)

    def _remove(self, node: Node) -> None:
        self._tree.remove(node)
        self._store.remove(node.key)

    def _touch(self, node: Node) -> None:
        now = self._now()
        for used in node.chain():
            used.used = now
            self._store.touch(used.key, now)

    def _now(self) -> int:
        """Return the time in ns, later than the last."""
        self._clock = max(time.time_ns(), self._clock + 1)
        return self._clock


def _common(held: Int32, wanted: Int32) -> int:
    """Return the number of tokens that two texts have in common at their beginning."""
    length = min(len(held), len(wanted))
    differ = np.flatnonzero(held[:length] != wanted[:length])
    return int(differ[0]) if len(differ) else length


def _take_back(session: Session, slot: int, tokens: int) -> None:
    counts = np.zeros(session.batch, np.int64)
    counts[slot] = tokens
    session.rollback(counts)
