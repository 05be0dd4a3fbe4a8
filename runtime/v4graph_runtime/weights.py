"""Where a session's weights come from."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph_runtime.state import Array

NamedArrays = Iterable[tuple[str, Array]]
# Of each piece of a tensor that its fingerprint reads.
SAMPLE_BYTES = 512


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


class Fingerprint:
    """What tells the weights of one model from those of another: names, shapes, dtypes and some bytes.

    Reading every byte of a large checkpoint would take minutes. Another training run changes nearly all
    values, so two short pieces of each tensor tell it.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}
        self._samples: dict[str, bytes] = {}

    def watch(self, weights: NamedArrays, *, keep: bool) -> Iterator[tuple[str, Array]]:
        """Pass arrays on: keep them to be read if the digest is asked for, or read each as it goes by.

        An array that the backend holds anyway costs nothing to keep, and its pages nothing to leave unread.
        """
        for name, array in weights:
            if keep:
                self._arrays[name] = array
            else:
                self._samples[name] = _sample(array)
            yield name, array
            # Or this one would still be held while the next is made.
            del array

    def digest(self) -> str:
        """Return the hex digest of what went by."""
        _read_ahead(self._arrays.values())
        while self._arrays:
            name, array = self._arrays.popitem()
            self._samples[name] = _sample(array)
        digest = hashlib.sha256()
        for name, sample in sorted(self._samples.items()):
            digest.update(f"{name}\0".encode() + sample)
        return digest.hexdigest()


def fingerprint(engine_dir: Path, manifest: Manifest, seen: Fingerprint) -> str:
    """Return the digest of an engine's weights; those that it embeds are read from its folder.

    Raises:
        CheckpointError: the file of embedded weights cannot be read.
    """
    if not manifest.embedded_weights:
        return seen.digest()
    files = sorted(engine_dir.glob("*.safetensors"))
    if not files:
        # Inside the plan or the graph, whose hash the manifest has.
        return hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()
    from v4graph.checkpoint.safetensors_file import SafetensorsFile

    embedded = Fingerprint()
    for stored in map(SafetensorsFile, files):
        for _ in embedded.watch(((name, stored.array(name)) for name in stored.tensors), keep=False):
            pass
    return embedded.digest()


def _pieces(array: Array) -> tuple[slice, slice]:
    """Return the elements that a fingerprint reads: the first, and some from the middle."""
    count, middle = max(SAMPLE_BYTES // array.itemsize, 1), array.size // 2
    return slice(0, count), slice(middle, middle + count)


def _sample(array: Array) -> bytes:
    """Return the digest of an array's dtype, shape and pieces."""
    # `flat` copies these few values only, whatever the array's strides are.
    pieces = (array.flat[piece].tobytes() for piece in _pieces(array))
    return hashlib.sha256(f"{array.dtype.name}{list(array.shape)}".encode() + b"".join(pieces)).digest()


def _read_ahead(arrays: Iterable[Array]) -> None:
    """Ask for the pages of every piece of mapped files at once: one after the other takes the disk's delay.

    Measured on a cold file on a virtual disk: 1.4 s for 500 tensors, 19 ms with this.
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    for array in arrays:
        for piece in _pieces(array) if array.flags.c_contiguous else ():
            first = array.ctypes.data + piece.start * array.itemsize
            page = first - first % mmap.PAGESIZE
            # What it answers does not matter: this is advice.
            advise(ctypes.c_void_p(page), ctypes.c_size_t(first + SAMPLE_BYTES - page), mmap.MADV_WILLNEED)
