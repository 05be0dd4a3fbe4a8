"""What makes the states of two engines interchangeable, part by part, and as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from v4graph.manifest import Manifest, State

# Parts in the order in which a difference is told, with the words for each.
PARTS = {
    "config": "config.json",
    "weights": "weights",
    "numerics": "numerics",
    "dtype": "dtype",
    "ops": "op versions",
    "rollback_slack": "rollback slack",
    "states": "state tensors",
}
_SHOWN = 60


@dataclass(frozen=True)
class Contract:
    """The parts by name; capacity is none of them: fewer or more rows hold the same values."""

    parts: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """Return the hex digest of all parts."""
        text = json.dumps(sorted(self.parts.items()), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: Contract) -> str | None:
        """Return the clause that names the first part that differs from another engine's, or None."""
        for name, words in PARTS.items():
            ours, theirs = self.parts.get(name, ""), other.parts.get(name, "")
            if ours != theirs:
                first, second = _shown(ours, theirs)
                return f"its {words} {_verb(words)} {first}, this engine's {second}"
        return None

    def to_json(self) -> str:
        """Return the parts as JSON."""
        return json.dumps(dict(self.parts), sort_keys=True, separators=(",", ":"))


def contract_of(manifest: Manifest, weights: str) -> Contract:
    """Return the contract of an engine and its weights' fingerprint."""
    return Contract(
        {
            "config": manifest.config_sha256,
            "weights": weights,
            "numerics": manifest.numerics,
            "dtype": manifest.dtype,
            "ops": _json([f"{name} {version}" for name, version in sorted(manifest.ops.items())]),
            "rollback_slack": str(manifest.rollback_slack),
            "states": _json([_state(state) for state in sorted(manifest.states, key=lambda s: s.name)]),
        }
    )


def _state(state: State) -> str:
    """Return one line: what of a state does not depend on the capacity."""
    rows = state.shape[1] if state.rule == "ring" else f"capacity/{state.ratio}"
    layers = ",".join(map(str, state.layers))
    return f"{state.name} of layers {layers}: {state.rule} {state.dtype} [{rows}, {state.shape[2]}]"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _shown(ours: str, theirs: str) -> tuple[str, str]:
    """Return two values that differ, short; of two lists what is in one of them only."""
    if ours.startswith("[") and theirs.startswith("["):
        first, second = json.loads(ours), json.loads(theirs)
        ours, theirs = (
            next((item for item in a if item not in b), "") for a, b in ((first, second), (second, first))
        )
    return (ours[:_SHOWN] or "none"), (theirs[:_SHOWN] or "none")


def _verb(words: str) -> str:
    return "are" if words.endswith("s") and words != "numerics" else "is"
