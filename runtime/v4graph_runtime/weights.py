"""Where a session's weights come from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph_runtime.state import Array

NamedArrays = Iterable[tuple[str, Array]]


class Weights(Protocol):
    """Where a session's weights come from; `v4graph.checkpoint.Checkpoint` is one."""

    def bound(self, manifest: Manifest) -> NamedArrays:
        """Yield the array of every weight input; refuse another model before reading any data."""
        ...


def bound_weights(
    engine_dir: Path, manifest: Manifest, checkpoint: str | Path | Weights | None
) -> NamedArrays:
    """Return the array of every weight input of an engine, each made when it is asked for.

    Raises:
        EngineError: a checkpoint where none is needed, or none where one is.
        CheckpointError: the checkpoint is not this engine's model.
    """
    if manifest.embedded_weights:
        if checkpoint is not None:
            raise EngineError(f"{engine_dir}: this engine embeds its weights; open it without a checkpoint.")
        return ()
    if checkpoint is None:
        raise EngineError(
            f"{engine_dir}: this engine holds no weights; name their checkpoint with --checkpoint DIR."
        )
    if isinstance(checkpoint, str | Path):
        from v4graph.checkpoint import Checkpoint

        return Checkpoint.open(Path(checkpoint)).bound(manifest)
    return checkpoint.bound(manifest)
