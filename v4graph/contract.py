"""The contract of a custom op as a hash: what a plugin, a kernel and an engine must agree on."""

from __future__ import annotations

import hashlib
import json

from v4graph.ops import OpSpec


def contract_sha256(spec: OpSpec) -> str:
    """Return the hex digest of an op's name, version, ports and attributes; not of its reference."""
    ports = [[[p.name, p.dtypes, p.shape, p.alias] for p in side] for side in (spec.inputs, spec.outputs)]
    attributes = {name: kind.__name__ for name, kind in spec.attributes.items()}
    text = json.dumps([spec.name, spec.version, *ports, attributes])
    return hashlib.sha256(text.encode()).hexdigest()
