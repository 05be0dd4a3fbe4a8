"""`Session`: an engine, a checkpoint's weights and the state of a batch of slots.

Source of the contract: design.md, sections 4 and 9. Any schedule of prefill, chunks, steps, idle
slots and rollback gives the same logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError, SessionError
from v4graph.manifest import Manifest
from v4graph_runtime.backends import Backend, NamedArrays, Options, prepare
from v4graph_runtime.engine import open_engine
from v4graph_runtime.state import Array, Int32, Positions

Logits = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# Attention scores take [B, S * heads, keys] floats, so a long prompt is run in pieces.
PREFILL_CHUNK = 512


class Weights(Protocol):
    """Where a session's weights come from; `v4graph.checkpoint.Checkpoint` is one."""

    def bound(self, manifest: Manifest) -> Iterable[tuple[str, Array]]:
        """Yield the array of every weight input; refuse another model before reading any data."""
        ...


class Session:
    """State and backend of `batch` slots; not safe to call from several threads at once.

    `position` counts the tokens in each slot's state, `state_bytes` the bytes of all state buffers.
    Logits are float32 [B, V] after the last valid token of each slot, or [B, S, V] if the engine was
    exported with all logits; rows of idle slots and of padding are zero. `close`, or leaving a `with`
    block, frees the backend's memory at once.
    """

    def __init__(
        self,
        engine_dir: str | Path,
        checkpoint: str | Path | Weights | None,
        batch: int = 1,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        options: Options | None = None,
    ) -> None:
        """Open an engine directory with the weights of a checkpoint directory.

        `checkpoint` is None for an engine that embeds its weights. `prefill_chunk` limits the tokens
        per slot in one run of the graph, as an engine's largest profile does. `options` are those of the
        engine's backend.

        Raises:
            ManifestError: `engine_dir` holds no engine.
            EngineError: the engine was changed, needs another version or machine, or cannot be loaded.
            CheckpointError: the checkpoint lacks a tensor or is another model's.
            SessionError: `batch` or `prefill_chunk` is not positive, more slots than the engine takes, or
                options of another backend.
        """
        for name, value in (("batch", batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise SessionError(f"{name} is {value}, expected at least 1.")
        self.engine_dir = Path(engine_dir)
        self.manifest = open_engine(self.engine_dir)
        self.batch = batch
        self.vocab_size = _vocab_size(self.manifest)
        prepared = prepare(self.engine_dir, self.manifest, batch, options)
        self.prefill_chunk = min(prefill_chunk, prepared.max_tokens or prefill_chunk)
        self._positions = Positions(batch, self.manifest.max_seq_len, self.manifest.rollback_slack)
        weights = bound_weights(self.engine_dir, self.manifest, checkpoint)
        opened = prepared.open(weights)
        self._backend: Backend | None = opened.backend
        self._free = opened.close
        self.state_bytes = opened.backend.state_bytes

    def close(self) -> None:
        """Free weights and states; later calls do nothing."""
        if self._backend is not None:
            self._backend = None
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def position(self) -> Int32:
        """Tokens in each slot's state, int32 [B] (a copy)."""
        return self._positions.tokens.copy()

    @property
    def capacity(self) -> int:
        """Tokens that a slot can hold."""
        return self._positions.capacity

    def prefill(self, ids: npt.ArrayLike, num_tokens: npt.ArrayLike | None = None) -> Logits:
        """Append tokens to the state and return logits.

        Args:
            ids: Integers [B, S]; entries past a slot's `num_tokens` are ignored.
            num_tokens: Valid tokens per slot [B], 0 to S; 0 leaves a slot as it is. All S if None.

        Raises:
            SessionError: wrong shape, dtype or token id, or no room in a slot. Nothing has changed.
            EngineError: the backend failed; the slots that had new tokens are then empty.
        """
        tokens = _integers("ids", ids)
        if tokens.ndim != 2 or tokens.shape[0] != self.batch or tokens.shape[1] == 0:
            raise SessionError(f"ids has shape {list(tokens.shape)}, expected [{self.batch}, S] with S >= 1.")
        counts = self._counts(num_tokens, tokens.shape[1])
        valid = np.arange(tokens.shape[1]) < counts[:, None]
        self._check_ids(tokens, valid)
        self._positions.check_room(counts)
        # Padding may hold any value, and the graph looks every id up.
        return self._append(np.where(valid, tokens, 0), counts)

    def decode(self, ids: npt.ArrayLike, num_tokens: npt.ArrayLike | None = None) -> Logits:
        """Append one token per slot: ids [B] or [B, 1], `num_tokens` 1 or 0 (idle) per slot.

        Raises:
            SessionError: as `prefill`.
        """
        tokens = _integers("ids", ids)
        if tokens.shape not in {(self.batch,), (self.batch, 1)}:
            raise SessionError(
                f"ids has shape {list(tokens.shape)}, decode takes [{self.batch}] or [{self.batch}, 1]; "
                "use prefill for more tokens."
            )
        return self.prefill(tokens.reshape(self.batch, 1), num_tokens)

    def rollback(self, tokens: npt.ArrayLike) -> None:
        """Take the last `tokens` [B] of each slot back, at most the engine's rollback slack.

        Raises:
            SessionError: wrong shape, or more tokens than the state can go back. Nothing has changed.
        """
        counts = self._per_slot("tokens", tokens)
        if (counts < 0).any():
            raise SessionError(
                f"tokens is {counts.tolist()}, expected numbers of tokens to take back, 0 or more."
            )
        self._positions.rollback(counts)

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Empty some slots, or all.

        Raises:
            SessionError: a slot that the batch does not have.
        """
        chosen = _integers("slots", range(self.batch) if slots is None else slots)
        for slot in chosen.ravel():
            if not 0 <= slot < self.batch:
                raise SessionError(f"slot {slot} does not exist, the batch has slots 0 to {self.batch - 1}.")
        self._positions.reset(chosen.ravel())

    def _append(self, ids: Ids, counts: Ids) -> Logits:
        """Run valid tokens in pieces of `prefill_chunk` and put the logits together."""
        if ids.shape[1] <= self.prefill_chunk and (counts == ids.shape[1]).all():
            return self._run(ids, counts.astype(np.int32))
        shape = ids.shape if self.manifest.all_logits else ids.shape[:1]
        logits = np.zeros((*shape, self.vocab_size), np.float32)
        for start, stop in _pieces(int(counts.max()), self.prefill_chunk):
            piece = np.clip(counts - start, 0, stop - start).astype(np.int32)
            out = self._run(ids[:, start:stop], piece)
            if self.manifest.all_logits:
                valid = np.arange(stop - start) < piece[:, None]
                logits[:, start:stop][valid] = out[valid]
            else:
                # A slot's logits come from the piece that holds its last token.
                last = (start < counts) & (counts <= stop)
                logits[last] = out[last]
        return logits

    def _run(self, ids: Ids, counts: Int32) -> Logits:
        shape = ids.shape if self.manifest.all_logits else ids.shape[:1]
        logits = np.empty((*shape, self.vocab_size), np.float32)
        inputs: Mapping[str, Array] = {
            "input_ids": np.ascontiguousarray(ids),
            "start_pos": self.position,
            "num_tokens": counts,
        }
        if self._backend is None:
            raise SessionError(f"{self.engine_dir}: this session is closed; open a new one.")
        try:
            self._backend.run(inputs, logits)
        except EngineError as error:
            slots = np.flatnonzero(counts).tolist()
            self.reset(slots)
            # A backend's own words, if any, are on the lines below our sentence.
            ours, *theirs = str(error).splitlines()
            ours = f"{ours.removesuffix('.')}; slots {slots} were reset."
            raise EngineError("\n".join([ours, *theirs])) from error
        self._positions.advance(counts)
        return logits

    def _per_slot(self, name: str, values: npt.ArrayLike) -> Ids:
        counts = _integers(name, values)
        if counts.shape != (self.batch,):
            raise SessionError(
                f"{name} has shape {list(counts.shape)}, expected one number per slot [{self.batch}]."
            )
        return counts

    def _counts(self, num_tokens: npt.ArrayLike | None, length: int) -> Ids:
        if num_tokens is None:
            return np.full(self.batch, length, np.int64)
        counts = self._per_slot("num_tokens", num_tokens)
        for slot in np.flatnonzero((counts < 0) | (counts > length))[:1]:
            raise SessionError(
                f"slot {slot}: num_tokens is {counts[slot]}, expected 0 to {length} (ids' columns)."
            )
        return counts

    def _check_ids(self, ids: Ids, valid: npt.NDArray[np.bool_]) -> None:
        bad = valid & ((ids < 0) | (ids >= self.vocab_size))
        for slot, column in np.argwhere(bad)[:1]:
            raise SessionError(
                f"slot {slot}: token id {ids[slot, column]} in column {column} is outside the vocabulary, "
                f"0 to {self.vocab_size - 1}."
            )


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


def _vocab_size(manifest: Manifest) -> int:
    return next(int(output.shape[-1]) for output in manifest.outputs if output.name == "logits")


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _integers(name: str, values: npt.ArrayLike) -> Ids:
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise SessionError(f"{name} is not a rectangular array of integers ({error}).") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise SessionError(f"{name} has dtype {array.dtype}, expected integers.")
    return array.astype(np.int64)
