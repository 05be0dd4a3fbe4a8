"""Which custom ops have a TensorRT plugin, and the hash that an engine records of each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from v4graph.contract import contract_sha256
from v4graph.errors import EngineError
from v4graph.ops import ALL_OPS, OpSpec

# Only the function bodies of the MoE ops call these; where V4MoE is a plugin they never appear.
_BODIES_ONLY = frozenset({"V4ExpertFp4", "V4ExpertFp8", "V4ExpertFloat"})
PLUGIN_OPS: tuple[OpSpec, ...] = tuple(op for op in ALL_OPS if op.name not in _BODIES_ONLY)

BUNDLE = Path(__file__).parent / "kernels" / "bundle"
INDEX = "index.json"


def plugin_versions() -> dict[str, int]:
    """Return every op that has a plugin, with its version."""
    return {op.name: op.version for op in PLUGIN_OPS}


def bundle_index(folder: Path = BUNDLE) -> dict[str, dict[str, str]] | None:
    """Return the kernel bundle's targets, each {op: sha256 of its kernels}; None if none is installed.

    Raises:
        EngineError: the index is damaged.
    """
    try:
        raw = json.loads((folder / INDEX).read_text())
        return {target: dict(kernels) for target, kernels in raw["targets"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise EngineError(
            f"{folder / INDEX}: not a kernel bundle's index ({error}); install v4graph again."
        ) from error


def plugin_hashes(folder: Path = BUNDLE) -> dict[str, str]:
    """Return the sha256 of each op's contract and of its kernels for every target."""
    index = bundle_index(folder) or {}
    return {
        op.name: hashlib.sha256(
            "\n".join(
                [
                    contract_sha256(op),
                    *(f"{t} {index[t][op.name]}" for t in sorted(index) if op.name in index[t]),
                ]
            ).encode()
        ).hexdigest()
        for op in PLUGIN_OPS
    }
