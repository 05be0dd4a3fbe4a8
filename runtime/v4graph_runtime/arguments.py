"""What callers of a session may give: arrays of integers, per slot, for a range of the slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def integers(name: str, values: npt.ArrayLike) -> Ids:
    """Return int64 of anything rectangular that holds integers.

    Raises:
        SessionError: ragged, or another dtype.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise SessionError(f"{name} is not a rectangular array of integers ({error}).") from error
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise SessionError(f"{name} has dtype {array.dtype}, expected integers.")
    return array.astype(np.int64)


def slot_range(slots: range | None, batch: int) -> range:
    """Return the slots that a call runs, all of the batch if None.

    Raises:
        SessionError: empty, with gaps, or outside the batch.
    """
    if slots is None:
        return range(batch)
    if slots.step != 1 or not 0 <= slots.start < slots.stop <= batch:
        raise SessionError(
            f"slots is {slots}, expected range(first, stop) with 0 <= first < stop <= {batch} (the batch)."
        )
    return slots


def chosen_slots(slots: Sequence[int] | None, batch: int) -> Ids:
    """Return slot indices [N], all of the batch if None.

    Raises:
        SessionError: a slot that the batch does not have.
    """
    chosen = integers("slots", range(batch) if slots is None else slots).ravel()
    for slot in chosen:
        if not 0 <= slot < batch:
            raise SessionError(f"slot {slot} does not exist, the batch has slots 0 to {batch - 1}.")
    return chosen


def per_slot(name: str, values: npt.ArrayLike, slots: int) -> Ids:
    """Return one integer per slot [slots].

    Raises:
        SessionError: another shape.
    """
    counts = integers(name, values)
    if counts.shape != (slots,):
        raise SessionError(f"{name} has shape {list(counts.shape)}, expected one number per slot [{slots}].")
    return counts


def amounts(name: str, values: npt.ArrayLike, slots: int) -> Ids:
    """Return a number of tokens to take back per slot.

    Raises:
        SessionError: another shape, or a negative number.
    """
    counts = per_slot(name, values, slots)
    if (counts < 0).any():
        raise SessionError(
            f"{name} is {counts.tolist()}, expected numbers of tokens to take back, 0 or more."
        )
    return counts


def token_counts(num_tokens: npt.ArrayLike | None, length: int, slots: range) -> Ids:
    """Return the valid tokens of each slot, all `length` if None.

    Raises:
        SessionError: another shape, or a number outside 0 to `length`.
    """
    if num_tokens is None:
        return np.full(len(slots), length, np.int64)
    counts = per_slot("num_tokens", num_tokens, len(slots))
    for index in np.flatnonzero((counts < 0) | (counts > length))[:1]:
        raise SessionError(
            f"slot {slots[index]}: num_tokens is {counts[index]}, expected 0 to {length} (ids' columns)."
        )
    return counts


def check_ids(ids: Ids, valid: Mask, slots: range, vocab_size: int) -> None:
    """Refuse a valid entry that is no token.

    Raises:
        SessionError: names the first.
    """
    bad = valid & ((ids < 0) | (ids >= vocab_size))
    for index, column in np.argwhere(bad)[:1]:
        raise SessionError(
            f"slot {slots[index]}: token id {ids[index, column]} in column {column} is outside the "
            f"vocabulary, 0 to {vocab_size - 1}."
        )
