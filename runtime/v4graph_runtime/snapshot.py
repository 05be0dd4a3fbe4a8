"""`Snapshot`: the state of one slot outside its session, in memory, as bytes or as a file.

The bytes are a safetensors file. Its metadata holds the engine's contract part by part, so that a
session which cannot use the state can say why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from v4graph.errors import SessionError
from v4graph_runtime.slot_state import Rows, SlotState
from v4graph_runtime.state import Array, Int32
from v4graph_runtime.state_contract import Contract
from v4graph_runtime.state_file import StateFile, damaged, pack, unpack, write_durably
from v4graph_runtime.state_rows import StateRows

KIND = "snapshot"


@dataclass(frozen=True)
class Snapshot:
    """Tokens of a slot and all that the model keeps of them; made by `Session.snapshot`.

    `notes` are texts by name that the caller keeps with it.
    """

    contract: Contract
    state: SlotState
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> Int32:
        """The ids of the tokens, int32 [position] (a copy)."""
        return self.state.tokens.copy()

    @property
    def position(self) -> int:
        """The number of tokens."""
        return len(self.state.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of rows and tokens."""
        return self.state.nbytes

    def to_bytes(self) -> bytes:
        """Return the snapshot as the bytes of a safetensors file."""
        text = {
            "contract": self.contract.to_json(),
            "highest": str(self.state.highest),
            "notes": json.dumps(dict(self.notes)),
        }
        return pack(KIND, text, groups_of(self.state))

    @classmethod
    def from_bytes(cls, data: bytes) -> Snapshot:
        """Return the snapshot that `to_bytes` wrote.

        Raises:
            SessionError: no snapshot, damaged, or of another format version.
        """
        return cls._read(data, "these bytes")

    def save(self, path: str | Path) -> None:
        """Write the snapshot to a file, which afterwards is there whole or is as it was.

        Raises:
            SessionError: the file cannot be written.
        """
        try:
            write_durably(Path(path), self.to_bytes())
        except OSError as error:
            raise SessionError(
                f"{path}: the snapshot cannot be written ({error.strerror or error}); "
                "choose another place or make room."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Snapshot:
        """Return the snapshot of a file.

        Raises:
            SessionError: it cannot be read, is no snapshot, damaged, or of another format version.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise SessionError(
                f"{path}: the snapshot cannot be read ({error.strerror or error}); check the path."
            ) from error
        return cls._read(data, str(path))

    @classmethod
    def _read(cls, data: bytes, what: str) -> Snapshot:
        file = unpack(data, KIND, what)
        try:
            contract, highest = Contract(json.loads(file.text["contract"])), int(file.text["highest"])
            ids, notes = file.group("tokens")["ids"], json.loads(file.text["notes"])
        except (KeyError, ValueError) as error:
            raise damaged(what, "its tokens, contract, notes or highest position are missing") from error
        return cls(contract, read_state(file, ids, highest), notes)

    def check(self, contract: Contract, layout: Iterable[StateRows], capacity: int, vocab_size: int) -> None:
        """Refuse to go into a session with this contract.

        Raises:
            SessionError: says what differs.
        """
        difference = self.contract.difference(contract)
        if difference is not None:
            raise SessionError(
                f"this snapshot is of another engine: {difference}; restore it where it was taken, "
                "or run the prompt again."
            )
        if self.position > capacity:
            raise SessionError(
                f"this snapshot holds {self.position} tokens, the engine has room for {capacity}; export "
                f"again with `v4graph export --max-seq-len {self.position}`."
            )
        check_state(self.state, layout, vocab_size)


def groups_of(state: SlotState) -> dict[str, Rows]:
    """Return the tensors of a state's file by group; tokens before `since` are other files'."""
    return {"tokens": {"ids": state.tokens[state.since :]}, "rings": state.rings, "appended": state.appended}


def read_state(file: StateFile, ids: Array, highest: int) -> SlotState:
    """Return the state in a file that holds all of it.

    Raises:
        SessionError: damaged.
    """
    if ids.ndim != 1 or ids.dtype != np.int32 or highest < len(ids):
        raise damaged(file.what, "its tokens do not fit its highest position")
    return SlotState(ids.astype(np.int32), highest, file.group("rings"), file.group("appended"))


def check_state(state: SlotState, layout: Iterable[StateRows], vocab_size: int) -> None:
    """Refuse rows and tokens that no session of a contract can have written.

    Raises:
        SessionError: names the tensor.
    """
    if ((state.tokens < 0) | (state.tokens >= vocab_size)).any():
        raise SessionError("this snapshot holds ids outside the engine's vocabulary; take it again.")
    for rows, wanted, array in state.parts(layout):
        if array is None or not rows.fits(array, wanted):
            found = "nothing" if array is None else f"{array.dtype.name} {list(array.shape)}"
            raise SessionError(
                f"this snapshot has {found} for '{rows.name}', expected {rows.dtype} "
                f"[{len(wanted)}, {rows.width}]; take it again."
            )
