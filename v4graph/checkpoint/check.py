"""Compares a checkpoint's tensors with the inventory that its configuration demands.

Only headers are read. Tensors of the MTP layers may be absent or left over: nothing binds them yet,
and transformers ignores them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from v4graph.checkpoint.names import split_expert
from v4graph.checkpoint.reader import FLOAT_DTYPES, TensorTable
from v4graph.config import ModelConfig, WeightFormat
from v4graph.errors import CheckpointError
from v4graph.inventory import FP4_BLOCK, FP8_BLOCK, Role, StoredTensor, stored, weight_specs

logger = logging.getLogger(__name__)

_SHOWN = 5


def check_tensors(path: Path, table: TensorTable, config: ModelConfig, weights: WeightFormat) -> None:
    """Check names, dtypes and shapes against the inventory.

    Raises:
        CheckpointError: tensors are missing or unexpected, or one has a wrong dtype or shape.
    """
    expected: set[str] = set()
    missing: list[str] = []
    for tensor, weight in _expected(table, config, weights):
        expected.add(tensor.name)
        if tensor.name in table:
            _check_tensor(path, table.header(tensor.name), tensor, weight)
        else:
            missing.append(tensor.name)
    extra = [name for name in table if name not in expected]
    absent = [name for name in missing if not name.startswith("mtp.")]
    surplus = [name for name in extra if not name.startswith("mtp.")]
    logger.debug(
        "MTP tensors: %d absent, %d left over", len(missing) - len(absent), len(extra) - len(surplus)
    )
    faults = [_listing("missing", absent), _listing("unexpected", surplus)]
    if any(faults):
        raise CheckpointError(
            f"{path}: {' and '.join(filter(None, faults))}; check that config.json and the weights "
            "belong together and that every shard was downloaded."
        )


def _expected(
    table: TensorTable, config: ModelConfig, weights: WeightFormat
) -> Iterator[tuple[StoredTensor, StoredTensor]]:
    """Yield each tensor to find and the weight that it belongs to; experts as the checkpoint has them."""
    for spec in weight_specs(config):
        parts = stored(spec, weights)
        split = split_expert(spec.name) if spec.role is Role.EXPERT and table.packed else None
        if split is None:
            yield from ((part, parts[0]) for part in parts)
        elif split[1] == 0:
            for part in parts:
                name = part.name.replace(".experts.0.", ".experts.")
                shape = (config.n_routed_experts, *part.shape)
                yield StoredTensor(name, part.dtype, shape), parts[0]


def _check_tensor(path: Path, found: StoredTensor, wanted: StoredTensor, weight: StoredTensor) -> None:
    if found.dtype != wanted.dtype and not {found.dtype, wanted.dtype} <= FLOAT_DTYPES:
        raise CheckpointError(
            f"{path}: {wanted.name} has dtype {found.dtype}, expected {wanted.dtype}; "
            "a checkpoint stores all matrices of one kind alike."
        )
    if found.shape == wanted.shape:
        return
    if wanted.name.endswith(".scale"):
        block = f"1x{FP4_BLOCK}" if weight.dtype == "I8" else f"{FP8_BLOCK}x{FP8_BLOCK}"
        packed = " packed bytes" if weight.dtype == "I8" else ""
        raise CheckpointError(
            f"{path}: {wanted.name} has shape {list(found.shape)}, which does not cover its weight "
            f"{list(weight.shape)}{packed} in blocks of {block}; expected {list(wanted.shape)}, "
            "so convert or download the checkpoint again."
        )
    raise CheckpointError(
        f"{path}: {wanted.name} has shape {list(found.shape)}, expected {list(wanted.shape)}; "
        "check that config.json and the weights belong together."
    )


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return f"{len(names)} tensor{'s' if names[1:] else ''} {what} ({shown}{more})"
