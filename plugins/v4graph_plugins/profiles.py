"""Optimization profiles of an engine, and the shape of every input in each, from the manifest alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from v4graph.errors import EngineError
from v4graph.manifest import Manifest, Profile

DECODE_TOKENS = 8
GRANULE = 128  # tokens; every compress ratio divides it
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Limits:
    """What calls may bring at most; `seq_len` 0 keeps the graph's capacity."""

    batch: int = 8
    input_len: int = 2048
    seq_len: int = 0


def capacity_of(manifest: Manifest, limits: Limits) -> int:
    """Return the capacity in tokens, a multiple of 128.

    Raises:
        EngineError: a limit is below 1, or a prompt piece would not fit the caches.
    """
    for option, value in (("--max-batch-size", limits.batch), ("--max-input-len", limits.input_len)):
        if value < 1:
            raise EngineError(f"{option} is {value}, expected at least 1.")
    if limits.seq_len < 0:
        raise EngineError(f"--max-seq-len is {limits.seq_len}, expected at least 1.")
    capacity = -(-(limits.seq_len or manifest.max_seq_len) // GRANULE) * GRANULE
    if limits.input_len > capacity:
        raise EngineError(
            f"--max-input-len {limits.input_len} is outside the profile: the caches hold {capacity} tokens; "
            f"lower it to {capacity} or raise --max-seq-len."
        )
    return capacity


def profiles(manifest: Manifest, limits: Limits) -> tuple[Profile, ...]:
    """Return the decode profile (S 1 to 8) and the prefill profile (S 1 to `input_len`).

    Raises:
        EngineError: as `capacity_of`.
    """
    capacity = capacity_of(manifest, limits)
    batch = (1, limits.batch, limits.batch)
    short = min(DECODE_TOKENS, limits.input_len)
    decode = Profile("decode", batch, (1, 1, short), (GRANULE, capacity, capacity))
    if limits.input_len <= DECODE_TOKENS:
        return (decode,)
    # A chunk of S tokens closes up to S / ratio blocks, for which the caches need rows.
    least = min(capacity, -(-limits.input_len // GRANULE) * GRANULE)
    tokens = (1, limits.input_len, limits.input_len)
    return decode, Profile("prefill", (1, 1, limits.batch), tokens, (least, capacity, capacity))


def dynamic_shapes(manifest: Manifest, profile: Profile) -> Iterator[tuple[str, Shapes]]:
    """Yield (input, (least, usual, most)) of every input with a symbolic dimension."""
    for contract in manifest.inputs:
        yield contract.name, _shapes(contract.shape, profile, 1)
    for state in manifest.states:
        for layer in state.layers:
            yield state.name.replace("{i}", str(layer)), _shapes(state.shape, profile, state.ratio)


def _shapes(shape: tuple[int | str, ...], profile: Profile, ratio: int) -> Shapes:
    least, usual, most = (tuple(_size(dim, profile, ratio, bound) for dim in shape) for bound in range(3))
    return least, usual, most


def _size(dim: int | str, profile: Profile, ratio: int, bound: int) -> int:
    if isinstance(dim, int):
        return dim
    if dim == "B":
        return profile.batch[bound]
    return profile.tokens[bound] if dim == "S" else profile.capacity[bound] // ratio
