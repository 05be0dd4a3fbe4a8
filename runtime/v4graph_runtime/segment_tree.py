"""Which segments there are: a tree over the tokens, an index of prefixes, and an order of use."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from v4graph_runtime.segment import Segment
from v4graph_runtime.state import Int32


@dataclass(eq=False)
class Node:
    """A segment in the tree; `hasher` has taken in the contract and all tokens up to its end."""

    segment: Segment
    key: str
    parent: Node | None
    nbytes: int
    used: int
    hasher: Any
    children: int = 0

    def chain(self) -> list[Node]:
        """Return the segments from the root to this one."""
        nodes = [self]
        while nodes[-1].parent is not None:
            nodes.append(nodes[-1].parent)
        return nodes[::-1]


@dataclass(frozen=True)
class Match:
    """A segment of which a text has the first `length` tokens, up to `back` before the segment's end."""

    node: Node
    length: int

    @property
    def back(self) -> int:
        """Tokens to take back after restoring it."""
        return self.node.segment.end - self.length


class SegmentTree:
    """Segments of any number of engines, each with its parent.

    A segment is found by the hash of all tokens before its end, and before each of the last few tokens that
    could be taken back: a look-up hashes a text once, at the lengths that occur.
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.nbytes = 0
        self._index: dict[bytes, list[Match]] = {}
        self._lengths: Counter[int] = Counter()

    def add(self, segment: Segment, nbytes: int, used: int) -> Node | None:
        """Put a segment under its parent; None if the parent is not there or ends elsewhere."""
        parent = self.nodes.get(segment.parent)
        if segment.parent and (parent is None or parent.segment.contract != segment.contract):
            return None
        if segment.start != (parent.segment.end if parent else 0):
            return None
        hasher = parent.hasher.copy() if parent else _hasher(segment.contract)
        node = Node(segment, segment.key, parent, nbytes, used, hasher)
        self.nodes[node.key] = node
        self.nbytes += nbytes
        if parent:
            parent.children += 1
        for digest, match in self._prefixes(node):
            self._index.setdefault(digest, []).append(match)
            self._lengths[match.length] += 1
        hasher.update(_bytes(segment.tokens))
        return node

    def remove(self, node: Node) -> None:
        """Take a segment without children out."""
        del self.nodes[node.key]
        self.nbytes -= node.nbytes
        if node.parent:
            node.parent.children -= 1
        start = node.parent.hasher if node.parent else _hasher(node.segment.contract)
        for digest, match in self._prefixes(node, start):
            left = [other for other in self._index[digest] if other.node is not node]
            self._lengths[match.length] -= 1
            if left:
                self._index[digest] = left
            else:
                del self._index[digest]
            if not self._lengths[match.length]:
                del self._lengths[match.length]

    def resize(self, node: Node, nbytes: int) -> None:
        """Set a segment's bytes."""
        self.nbytes += nbytes - node.nbytes
        node.nbytes = nbytes

    def below(self, node: Node) -> list[Node]:
        """Return a segment and all that follow on it, children before their parents."""
        found = [other for other in self.nodes.values() if node in other.chain()]
        return sorted(found, key=lambda other: -other.segment.end)

    def matches(self, contract: str, tokens: Int32) -> Iterator[Match]:
        """Yield the segments of which a text has a prefix, longest prefix first, then least to take back."""
        for _, digest in reversed(list(self._digests(contract, tokens))):
            yield from sorted(self._index.get(digest, ()), key=lambda match: match.back)

    def oldest(self, kept: Node | None) -> Node | None:
        """Return the segment without children that was used longest ago; not `kept`."""
        leaves = (node for node in self.nodes.values() if not node.children and node is not kept)
        return min(leaves, key=lambda node: node.used, default=None)

    def _digests(self, contract: str, tokens: Int32) -> Iterator[tuple[int, bytes]]:
        hasher, done = _hasher(contract), 0
        for length in sorted(length for length in self._lengths if length <= len(tokens)):
            hasher.update(_bytes(tokens[done:length]))
            done = length
            yield length, hasher.digest()

    def _prefixes(self, node: Node, start: Any = None) -> Iterator[tuple[bytes, Match]]:
        """Yield each prefix that ends in a segment's own tokens and can be reached from its end."""
        segment = node.segment
        hasher, done = (start or node.hasher).copy(), segment.start
        for length in range(max(segment.end - segment.back, segment.start + 1), segment.end + 1):
            hasher.update(_bytes(segment.tokens[done - segment.start : length - segment.start]))
            done = length
            yield hasher.digest(), Match(node, length)


def _hasher(contract: str) -> Any:
    return hashlib.sha256(contract.encode())


def _bytes(tokens: Int32) -> bytes:
    return tokens.astype("<i4").tobytes()
