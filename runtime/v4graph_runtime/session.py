"""`Session`: an engine, a checkpoint's weights and the state of a batch of slots.

Source of the contract: design.md, sections 4 and 9. Any schedule of prefill, chunks, steps, idle
slots and rollback gives the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError, SessionError
from v4graph_runtime.arguments import (
    Ids,
    amounts,
    check_ids,
    chosen_slots,
    integers,
    slot_range,
    token_counts,
)
from v4graph_runtime.backends import Backend, Options, movable, prepare
from v4graph_runtime.calls import pieces, vocabulary, widened, with_reset_slots
from v4graph_runtime.engine import open_engine
from v4graph_runtime.slot_state import SlotState
from v4graph_runtime.snapshot import Snapshot
from v4graph_runtime.state import Array, Int32, Positions
from v4graph_runtime.state_contract import Contract, contract_of
from v4graph_runtime.state_rows import state_rows
from v4graph_runtime.weights import Fingerprint, Weights, bound_weights, fingerprint

Logits = npt.NDArray[np.float32]

# Attention scores take [B, S * heads, keys] floats, so a long prompt is run in pieces.
PREFILL_CHUNK = 512


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
        self.vocab_size = vocabulary(self.manifest)
        prepared = prepare(self.engine_dir, self.manifest, batch, options)
        self.prefill_chunk = min(prefill_chunk, prepared.max_tokens or prefill_chunk)
        self._layout = tuple(state_rows(self.manifest))
        self._positions = Positions(batch, self.manifest.max_seq_len, self.manifest.rollback_slack)
        weights = bound_weights(self.engine_dir, self.manifest, checkpoint)
        self._weights = Fingerprint()
        opened = prepared.open(self._weights.watch(weights, keep=prepared.keeps_weights))
        self._backend: Backend | None = opened.backend
        self._free = opened.close
        self.state_bytes = opened.backend.state_bytes

    def close(self) -> None:
        """Free weights and states; later calls do nothing."""
        if self._backend is not None:
            self._backend = None
            self._weights = Fingerprint()
            self._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> Int32:
        """Tokens in each slot's state, int32 [B] (a copy)."""
        return self._positions.tokens.copy()

    @property
    def slot_ranges(self) -> bool:
        """Whether a call for a range of slots costs only them; if not, it runs the whole batch."""
        return self._opened().slot_ranges

    @property
    def capacity(self) -> int:
        """Tokens that a slot can hold."""
        return self._positions.capacity

    def tokens(self, slot: int = 0) -> Int32:
        """Return the ids of the tokens in a slot's state, int32 [position] (a copy)."""
        return self._positions.held(*chosen_slots([slot], self.batch))

    def prefill(
        self, ids: npt.ArrayLike, num_tokens: npt.ArrayLike | None = None, *, slots: range | None = None
    ) -> Logits:
        """Append tokens to the state and return logits.

        Args:
            ids: Integers [B, S]; entries past a slot's `num_tokens` are ignored.
            num_tokens: Valid tokens per slot [B], 0 to S; 0 leaves a slot as it is. All S if None.
            slots: Run these only, as if they were the whole batch: `ids`, `num_tokens` and the logits have
                one row for each of them. Where the backend can (`slot_ranges`) the others cost nothing.

        Raises:
            SessionError: wrong shape, dtype or token id, or no room in a slot. Nothing has changed.
            EngineError: the backend failed; the slots that had new tokens are then empty.
        """
        chosen = slot_range(slots, self.batch)
        tokens = integers("ids", ids)
        if tokens.ndim != 2 or tokens.shape[0] != len(chosen) or tokens.shape[1] == 0:
            raise SessionError(
                f"ids has shape {list(tokens.shape)}, expected [{len(chosen)}, S] with S >= 1."
            )
        counts = token_counts(num_tokens, tokens.shape[1], chosen)
        valid = np.arange(tokens.shape[1]) < counts[:, None]
        check_ids(tokens, valid, chosen, self.vocab_size)
        self._positions.check_room(counts, chosen)
        self._opened()
        try:
            # Padding may hold any value, and the graph looks every id up.
            return self._append(np.where(valid, tokens, 0), counts, chosen)
        except BaseException as error:
            # Whatever it was: rows may be half written, and a piece that went well has lost its logits.
            touched = (chosen.start + np.flatnonzero(counts)).tolist()
            self.reset(touched)
            if isinstance(error, EngineError):
                raise with_reset_slots(error, touched) from error
            raise

    def decode(
        self, ids: npt.ArrayLike, num_tokens: npt.ArrayLike | None = None, *, slots: range | None = None
    ) -> Logits:
        """Append one token per slot: ids [B] or [B, 1], `num_tokens` 1 or 0 (idle) per slot.

        Raises:
            SessionError: as `prefill`.
        """
        rows = len(slot_range(slots, self.batch))
        tokens = integers("ids", ids)
        if tokens.shape not in {(rows,), (rows, 1)}:
            raise SessionError(
                f"ids has shape {list(tokens.shape)}, decode takes [{rows}] or [{rows}, 1]; "
                "use prefill for more tokens."
            )
        return self.prefill(tokens.reshape(rows, 1), num_tokens, slots=slots)

    def rollback(self, tokens: npt.ArrayLike) -> None:
        """Take the last `tokens` [B] of each slot back, at most the engine's rollback slack.

        Raises:
            SessionError: wrong shape, or more tokens than the state can go back. Nothing has changed.
        """
        self._positions.rollback(amounts("tokens", tokens, self.batch))

    def reset(self, slots: Sequence[int] | None = None) -> None:
        """Empty some slots, or all.

        Raises:
            SessionError: a slot that the batch does not have.
        """
        self._positions.reset(chosen_slots(slots, self.batch))

    def rollback_limit(self, slot: int = 0) -> int:
        """Return how many tokens `rollback` could take from a slot now."""
        return int(self._positions.limits()[chosen_slots([slot], self.batch)[0]])

    @property
    def contract(self) -> str:
        """The digest of what makes states of two sessions interchangeable: model, weights, numerics."""
        return self.state_contract.digest

    @cached_property
    def state_contract(self) -> Contract:
        """The parts of `contract`; the first call reads a few bytes of every weight."""
        self._opened()
        return contract_of(self.manifest, fingerprint(self.engine_dir, self.manifest, self._weights))

    @property
    def movable_states(self) -> bool:
        """Whether `snapshot`, `restore` and `fork` work with this backend."""
        return self._opened().movable_states

    def snapshot(self, slot: int = 0, *, notes: Mapping[str, str] | None = None) -> Snapshot:
        """Copy a slot's state and tokens out of the session; `notes` are kept with them.

        Raises:
            SessionError: no such slot, or states that this backend cannot move.
            EngineError: the backend failed.
        """
        return Snapshot(self.state_contract, self.slot_state(slot), notes or {})

    def slot_state(self, slot: int = 0, *, since: int = 0) -> SlotState:
        """Copy what a slot holds; of its caches only the rows that tokens from `since` on have filled.

        Raises:
            SessionError: as `snapshot`.
        """
        (index,) = chosen_slots([slot], self.batch)
        return SlotState.take(self._movable(), self._layout, self._positions, index, since)

    def restore(self, snapshot: Snapshot, slot: int = 0) -> None:
        """Make a slot's state and tokens those of a snapshot, of this session or of another like it.

        The capacity may differ. `rollback` then goes as far as it did where the snapshot was taken.

        Raises:
            SessionError: another model, other weights or numerics, too many tokens. Nothing has changed.
            EngineError: the backend failed; the slot is then empty.
        """
        (index,) = chosen_slots([slot], self.batch)
        snapshot.check(self.state_contract, self._layout, self.capacity, self.vocab_size)
        snapshot.state.put(self._movable(), self._layout, self._positions, index)

    def fork(self, source: int, target: int) -> None:
        """Make a slot's state and tokens those of another slot.

        Raises:
            SessionError: no such slot, or states that this backend cannot move. Nothing has changed.
            EngineError: the backend failed; the target is then empty.
        """
        first, second = chosen_slots([source, target], self.batch)
        if first != second:
            self.slot_state(first).put(self._movable(), self._layout, self._positions, second)

    def _movable(self) -> Backend:
        return movable(self._opened(), self.engine_dir)

    def _append(self, ids: Ids, counts: Ids, slots: range) -> Logits:
        """Run valid tokens in pieces of `prefill_chunk` and put the logits together."""
        if ids.shape[1] <= self.prefill_chunk and (counts == ids.shape[1]).all():
            return self._run(ids, counts.astype(np.int32), slots)
        shape = ids.shape if self.manifest.all_logits else ids.shape[:1]
        logits = np.zeros((*shape, self.vocab_size), np.float32)
        for start, stop in pieces(int(counts.max()), self.prefill_chunk):
            piece = np.clip(counts - start, 0, stop - start).astype(np.int32)
            out = self._run(ids[:, start:stop], piece, slots)
            if self.manifest.all_logits:
                valid = np.arange(stop - start) < piece[:, None]
                logits[:, start:stop][valid] = out[valid]
            else:
                # A slot's logits come from the piece that holds its last token.
                last = (start < counts) & (counts <= stop)
                logits[last] = out[last]
        return logits

    def _run(self, ids: Ids, counts: Int32, slots: range) -> Logits:
        """Run the backend on the slots, or on all with the others idle where it takes no range."""
        backend = self._opened()
        if len(slots) == self.batch or backend.slot_ranges:
            return self._run_rows(backend, ids, counts, slots)
        out = self._run_rows(backend, *widened(ids, counts, slots, self.batch), range(self.batch))
        return out[slots.start : slots.stop]

    def _run_rows(self, backend: Backend, ids: Ids, counts: Int32, slots: range) -> Logits:
        shape = ids.shape if self.manifest.all_logits else ids.shape[:1]
        logits = np.empty((*shape, self.vocab_size), np.float32)
        inputs: Mapping[str, Array] = {
            "input_ids": np.ascontiguousarray(ids),
            "start_pos": self._positions.tokens[slots.start : slots.stop].copy(),
            "num_tokens": counts,
        }
        backend.run(inputs, logits, slots.start)
        self._positions.advance(ids, counts, slots)
        return logits

    def _opened(self) -> Backend:
        if self._backend is None:
            raise SessionError(f"{self.engine_dir}: this session is closed; open a new one.")
        return self._backend
