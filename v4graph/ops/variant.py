"""Names of an op's variants in a portable file, where each code path of an op has a body of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from v4graph.ops.spec import OpSpec

FLOAT_SCALE = "scale_float32"


def has_scale(spec: OpSpec) -> bool:
    """Whether an op takes scales of either kind: e8m0 bytes, or float32 as in Base checkpoints."""
    return any(set(port.dtypes) == {"int8", "float32"} for port in spec.inputs)


def variant_name(spec: OpSpec, structural: Mapping[str, Any], scale: str) -> str:
    """Return a function's name: the op, then `__` and a tag that backends strip."""
    tags = [f"{key}_{structural[key]}" for key in spec.structural]
    if scale == "float32" and has_scale(spec):
        tags.append(FLOAT_SCALE)
    return "__".join([spec.name, "_".join(tags)]) if tags else spec.name
