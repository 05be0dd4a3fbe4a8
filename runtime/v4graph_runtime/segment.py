"""A segment: a piece of a text in the prefix cache, and the state at its end.

It follows on its parent's last token, and holds the rings at its end but only those cache rows that its own
tokens have filled: so a text in pieces takes bytes in proportion to its length, and pieces are shared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from v4graph_runtime.slot_state import SlotState
from v4graph_runtime.snapshot import groups_of
from v4graph_runtime.state import Int32
from v4graph_runtime.state_file import StateFile, damaged, pack

KIND = "segment"


@dataclass(frozen=True)
class Segment:
    """What is known of a segment without its rows.

    `contract` is the digest of the engine's, `parent` the key of the segment before ("" for none), `start`
    the parent's last position. The state at `end` once reached position `highest`, and `back` tokens could
    be taken back.
    """

    contract: str
    parent: str
    start: int
    tokens: Int32
    highest: int
    back: int

    @property
    def end(self) -> int:
        """The position at its last token."""
        return self.start + len(self.tokens)

    @property
    def key(self) -> str:
        """The name: a hash of the engine's contract and of every token up to the end, piece by piece."""
        head = f"{KIND}\0{self.contract}\0{self.parent}\0".encode()
        return hashlib.sha256(head + self.tokens.astype("<i4").tobytes()).hexdigest()


def pack_segment(segment: Segment, state: SlotState) -> bytes:
    """Return the safetensors file of a segment; `state` holds the rows since its start."""
    text = {
        "contract": segment.contract,
        "parent": segment.parent,
        "start": str(segment.start),
        "highest": str(segment.highest),
        "back": str(segment.back),
    }
    return pack(KIND, text, groups_of(state))


def read_segment(file: StateFile) -> Segment:
    """Return what a file says; its key tells whether the tokens are whole, checksums are for the rows.

    Raises:
        SessionError: something is missing.
    """
    text = file.text
    try:
        ids = file.group("tokens", check=False)["ids"]
        numbers = (int(text[name]) for name in ("start", "highest", "back"))
        start, highest, back = numbers
        contract, parent = text["contract"], text["parent"]
    except (KeyError, ValueError) as error:
        raise damaged(file.what, "a part of its metadata is missing") from error
    if ids.ndim != 1 or ids.dtype != np.int32 or not len(ids) or start < 0 or highest < start + len(ids):
        raise damaged(file.what, "its tokens do not fit its positions")
    return Segment(contract, parent, start, ids.astype(np.int32), highest, back)
