"""Which custom ops have a TensorRT plugin, and the hash that an engine records of each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from v4graph.contract import contract_sha256
from v4graph.launch import PLANS
from v4graph.ops import ALL_OPS, OpSpec

# Only the function bodies of the MoE ops call these; where V4MoE is a plugin they never appear.
_BODIES_ONLY = frozenset({"V4ExpertFp4", "V4ExpertFp8", "V4ExpertFloat"})
PLUGIN_OPS: tuple[OpSpec, ...] = tuple(op for op in ALL_OPS if op.name not in _BODIES_ONLY)

BUNDLE = Path(__file__).parent / "kernels" / "bundle"


def plugin_versions() -> dict[str, int]:
    """Return every op that has a plugin, with its version."""
    return {op.name: op.version for op in PLUGIN_OPS}


def plugin_hashes() -> dict[str, str]:
    """Return the sha256 of each op's contract and launch plan: what an engine and its kernels rely on."""
    return {op.name: _hash(op) for op in PLUGIN_OPS}


def _hash(op: OpSpec) -> str:
    plan = json.dumps(PLANS[op.name].as_json(), sort_keys=True) if op.name in PLANS else ""
    return hashlib.sha256(f"{contract_sha256(op)}\n{plan}".encode()).hexdigest()
