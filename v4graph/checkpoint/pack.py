"""Rewrites a checkpoint: experts stacked as the graph wants them, or quantised to the official format.

`v4graph pack SRC DST` makes the `stack` layout a view of the file instead of a copy at load;
`v4graph pack SRC DST --quantize` turns a model trained with transformers into official FP8/FP4.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from v4graph.checkpoint.model import Checkpoint
from v4graph.checkpoint.names import split_expert
from v4graph.checkpoint.quantise import check_quantisable, quantise_weight
from v4graph.checkpoint.reader import TensorTable
from v4graph.checkpoint.writer import SHARD_BYTES, CheckpointWriter, Progress, check_target
from v4graph.config import FILE_NAME, OFFICIAL
from v4graph.config.hub import hub_form
from v4graph.errors import CheckpointError
from v4graph.inventory import StoredTensor, stored, weight_specs

logger = logging.getLogger(__name__)

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def pack(
    src: Checkpoint | str | Path,
    dst: str | Path,
    *,
    quantise: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write `src` to the new directory `dst`, with its config.json and tokenizer files.

    Without `quantise` each layer's experts become one tensor [E, ...] and all else stays as it is.
    With it, an unquantised model is stored as FP8 and FP4 under the official names, unstacked, with
    config.json in the official form.

    Raises:
        CheckpointError: `src` is not a sound checkpoint, `dst` exists, or `src` cannot be quantised.
    """
    check_target(Path(dst))
    checkpoint = src if isinstance(src, Checkpoint) else Checkpoint.open(src)
    checkpoint.check()
    if quantise:
        _quantise(checkpoint, Path(dst), shard_bytes, progress)
    else:
        _stack(checkpoint, Path(dst), shard_bytes, progress)


def _folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _copy_companions(checkpoint: Checkpoint, writer: CheckpointWriter, names: tuple[str, ...]) -> None:
    for name in names:
        if (_folder(checkpoint) / name).is_file():
            writer.copy(_folder(checkpoint) / name)


def _stack(checkpoint: Checkpoint, dst: Path, shard_bytes: int, progress: Progress | None) -> None:
    parts = _stacked_parts(checkpoint.tensors)
    targets = []
    for name, sources in parts.items():
        header = checkpoint.tensors.header(sources[0])
        shape = header.shape if sources == [name] else (len(sources), *header.shape)
        targets.append(StoredTensor(name, header.dtype, shape))
    with CheckpointWriter(dst, targets, shard_bytes, progress) as writer:
        for name, sources in parts.items():
            writer.write_parts(name, (checkpoint.array(source) for source in sources))
        _copy_companions(checkpoint, writer, (FILE_NAME, *COMPANIONS))


def _stacked_parts(table: TensorTable) -> Mapping[str, list[str]]:
    """Return each tensor to write, layer by layer, with the tensors that it joins."""
    experts: dict[str, dict[int, str]] = defaultdict(dict)
    parts: dict[str, list[str]] = {}
    for name in table:
        split = split_expert(name)
        if split:
            experts[split[0]][split[1]] = name
        else:
            parts[name] = [name]
    for stacked, members in experts.items():
        if members.keys() == set(range(len(members))):
            parts[stacked] = [members[e] for e in range(len(members))]
        else:
            # Only an incomplete MTP layer comes here: the check lets it pass, so it is kept as it is.
            parts |= {name: [name] for name in members.values()}
    return dict(sorted(parts.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: model-wide tensors, then layers by number."""
    pieces = re.split(r"(\d+)", name)
    return [(len(pieces) > 1, int(piece) if piece.isdigit() else 0, piece) for piece in pieces]


def _quantise(checkpoint: Checkpoint, dst: Path, shard_bytes: int, progress: Progress | None) -> None:
    if checkpoint.weights.quantised or checkpoint.weights.expert != "float":
        raise CheckpointError(
            f"{checkpoint.path}: is quantised already; use `v4graph pack` without --quantize."
        )
    check_quantisable(checkpoint.config, OFFICIAL)
    # The check accepts a checkpoint without its MTP tensors, so there may be fewer than specified.
    specs = [spec for spec in weight_specs(checkpoint.config) if spec.name in checkpoint.tensors]
    targets = [target for spec in specs for target in stored(spec, OFFICIAL)]
    left_over = (
        sum(name.startswith("mtp.") for name in checkpoint.tensors) if not checkpoint.config.mtp_layers else 0
    )
    if left_over:
        logger.warning("%d MTP tensors left out: config.json announces no MTP layer", left_over)
    with CheckpointWriter(dst, targets, shard_bytes, progress) as writer:
        for spec in specs:
            for name, data in quantise_weight(spec, checkpoint.array(spec.name)):
                writer.write(name, data)
        raw = hub_form(checkpoint.config, OFFICIAL)
        writer.write_text(FILE_NAME, json.dumps(raw, indent=2) + "\n")
        _copy_companions(checkpoint, writer, COMPANIONS)
