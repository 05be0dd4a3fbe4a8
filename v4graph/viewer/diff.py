"""Two graphs' layers side by side: for each kind of change, the ops of one aligned with those of the other.

Two ops are the same if their type and the owner of their first weight are; a pair whose shapes, dtypes,
attributes or figures differ is `changed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from v4graph.viewer.blocks import Json, groups

_FIGURES = ("bytes", "flops", "launches")


def compare(before: Json, after: Json) -> list[Json]:
    """Return groups of layers that changed alike, each with `rows` of (tag, op before, op after, changes).

    `before` and `after` are graphs of a report, both opened. Ops are indices into the blocks `before` and
    `after` of the group, None where there is none. Tags: same, changed, added, removed.
    """
    left = {layer["name"]: layer for layer in before["layers"]}
    right = {layer["name"]: layer for layer in after["layers"]}
    missing: Json = {"kind": None, "block": None}
    pairs = [
        {
            "name": name,
            "before_kind": left.get(name, missing)["kind"],
            "kind": right.get(name, missing)["kind"],
            "before": left.get(name, missing)["block"],
            "after": right.get(name, missing)["block"],
        }
        for name in _merged(list(left), list(right))
    ]
    found = groups(pairs, ("before_kind", "kind", "before", "after"))
    for group in found:
        group["rows"] = _rows(
            _block_nodes(before["blocks"], group["before"]), _block_nodes(after["blocks"], group["after"])
        )
    return found


def _block_nodes(blocks: list[Json], index: int | None) -> list[Json]:
    return [] if index is None else list(blocks[index]["nodes"])


def _merged(left: list[str], right: list[str]) -> list[str]:
    """Return the names of both lists, in order."""
    names: list[str] = []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        names += left[a0:a1]
        names += right[b0:b1] if tag != "equal" else []
    return list(dict.fromkeys(names))


def _rows(left: list[Json], right: list[Json]) -> list[list[Any]]:
    a, b = ([(node["op"], node["role"]) for node in nodes] for nodes in (left, right))
    rows: list[list[Any]] = []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            for i, j in zip(range(a0, a1), range(b0, b1), strict=True):
                changes = list(_changes(left[i], right[j]))
                rows.append(["changed" if changes else "same", i, j, changes])
            continue
        rows += [["removed", i, None, []] for i in range(a0, a1)]
        rows += [["added", None, j, []] for j in range(b0, b1)]
    return rows


def _changes(left: Json, right: Json) -> Iterator[str]:
    """Say what differs in two ops of one type; names of activations do not count."""
    for field in ("inputs", "outputs"):
        if len(left[field]) != len(right[field]):
            yield f"{field}: {len(left[field])} → {len(right[field])}"
            continue
        for one, other in zip(left[field], right[field], strict=True):
            yield from _tensor_changes(one, other)
    keys = sorted({*left["attributes"], *right["attributes"]})
    for key in keys:
        one, other = left["attributes"].get(key, "none"), right["attributes"].get(key, "none")
        if one != other:
            yield f"{key}: {one} → {other}"
    yield from (field for field in _FIGURES if left[field] != right[field])


def _tensor_changes(one: Json, other: Json) -> Iterator[str]:
    named = {one["kind"], other["kind"]} != {"activation"}
    if named and one["name"] != other["name"]:
        yield f"{one['name']} → {other['name']}"
    for field in ("dtype", "shape"):
        if one[field] != other[field]:
            yield f"{other['name']}: {_text(one[field])} → {_text(other[field])}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else " or ".join(dict.fromkeys(value))
