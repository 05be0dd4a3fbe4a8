"""Finding marks and DSML tags in text that arrives in pieces.

Whatever is decided here depends on the text alone, never on where it was cut: a decision is taken once
no continuation can change it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# So much of a tag without an end is given up; a tool's name has 64 characters at most.
TAG_LIMIT = 1000
# Besides '>', a tag ends where another thing begins: '>' was forgotten.
_TAG_END = re.compile(r">|\n|</?｜")
# A quote that closes: none that stands behind '='.
_LAST_QUOTE = re.compile(r'[^=\s]\s*"\s*$')
_NAME = r"""\s*name\s*=\s*(?:"(?P<a>.*?)"|'(?P<b>.*?)'|(?P<c>[^\s"']+))"""
_STRING = r"""\s*(?:string\s*=\s*["']?(?P<string>true|false)["']?)?\s*$"""
_ATTRIBUTES = re.compile(_NAME + _STRING, re.DOTALL)


class Marks:
    """A set of marks, none of which begins another."""

    def __init__(self, *marks: str) -> None:
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._beginnings = frozenset(mark[:size] for mark in marks for size in range(1, len(mark)))
        self._longest = max(map(len, marks)) - 1

    def split(self, text: str) -> tuple[str, str, str]:
        """Return the text before the first mark, the mark, and the rest.

        Without a mark the rest is what the next piece may complete to one.
        """
        if found := self._pattern.search(text):
            return text[: found.start()], found[0], text[found.end() :]
        for size in range(min(len(text), self._longest), 0, -1):
            if text[-size:] in self._beginnings:
                return text[:-size], "", text[-size:]
        return text, "", ""


@dataclass(frozen=True)
class Tag:
    """What stands between `<｜DSML｜` and `>`.

    `kind` is its first word. `name` is None where there is none, `string` where it says neither.
    `closed` is whether `>` ended it.
    """

    kind: str
    name: str | None
    string: bool | None
    closed: bool


def split_tag(text: str) -> tuple[Tag, str] | None:
    """Return the tag at the beginning of `text`, after its opening mark, and the rest; None: not all there.

    A name may hold '>', so a tag with quotes ends at the first '>' behind a quote.
    """
    head = text[:TAG_LIMIT]
    for found in _TAG_END.finditer(head):
        body = head[: found.start()]
        if found[0] != ">":
            return _tag(body, closed=False), text[found.start() :]
        if '"' not in body or _LAST_QUOTE.search(body):
            return _tag(body, closed=True), text[found.end() :]
    if len(text) < TAG_LIMIT:
        return None
    return _tag(head, closed=False), text[TAG_LIMIT:]


def _tag(body: str, *, closed: bool) -> Tag:
    kind = re.match(r"\s*(\w*)", body)
    assert kind is not None  # both parts may be empty
    found = _ATTRIBUTES.match(body, kind.end())
    if found is None:
        return Tag(kind[1], None, None, closed)
    name = next(found[group] for group in "abc" if found[group] is not None)
    return Tag(kind[1], name, {"true": True, "false": False}.get(found["string"]), closed)
