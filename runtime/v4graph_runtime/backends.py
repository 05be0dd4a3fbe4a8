"""Which backend runs an engine, chosen by its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError
from v4graph.manifest import Manifest
from v4graph_runtime import trt_backend
from v4graph_runtime.engine import MODEL, check_dtype, check_file
from v4graph_runtime.ort_backend import OrtBackend, OrtOptions
from v4graph_runtime.state import Array, state_tensors
from v4graph_runtime.trt_backend import TrtOptions
from v4graph_runtime.weights import NamedArrays

Options = OrtOptions | TrtOptions


class Backend(Protocol):
    """Runs an engine on the states of a batch, which it holds."""

    # Bytes of all state buffers.
    state_bytes: int
    # Whether `run` takes fewer slots than the batch has.
    slot_ranges: bool
    # Whether `read_state` and `write_state` can be called.
    movable_states: bool

    def run(self, inputs: Mapping[str, Array], logits: npt.NDArray[np.float32], first: int = 0) -> None:
        """Run once on input_ids, start_pos and num_tokens; `logits` receives the output.

        Their rows are those of the whole batch or, with `slot_ranges`, of some slots from `first` on.

        Raises:
            EngineError: the backend failed; the states of slots with new tokens are then undefined.
        """

    def read_state(self, name: str, slot: int, rows: range) -> Array:
        """Return a copy of some rows of a slot of a state tensor, [len(rows), width].

        Raises:
            EngineError: the backend failed.
        """

    def write_state(self, name: str, slot: int, rows: range, array: Array) -> None:
        """Replace some rows of a slot of a state tensor by `array` [len(rows), width].

        Raises:
            EngineError: the backend failed; the slot's state is then undefined.
        """


def movable(backend: Backend, directory: Path) -> Backend:
    """Return a backend whose states can be read and written.

    Raises:
        SessionError: they cannot.
    """
    if not backend.movable_states:
        raise SessionError(
            f"{directory}: onnxruntime gives no bfloat16 state from a GPU, so this session has no snapshots, "
            "restore or fork; build the engine with `--backend trt` for them."
        )
    return backend


@dataclass(frozen=True)
class Opened:
    """A backend, and what frees it at once rather than when it is forgotten."""

    backend: Backend
    close: Callable[[], None]


@dataclass(frozen=True)
class Prepared:
    """An engine that has passed its checks.

    `max_tokens` limits S of one run, None for no limit; `keeps_weights` says that the opened backend holds
    the arrays that it was given, not copies on a GPU.
    """

    open: Callable[[NamedArrays], Opened]
    max_tokens: int | None = None
    keeps_weights: bool = False


def prepare(directory: Path, manifest: Manifest, batch: int, options: Options | None) -> Prepared:
    """Check an engine for its backend before any weight is read.

    Raises:
        EngineError: the engine was changed, or cannot run on this machine or with these options.
        SessionError: options of another backend, or a batch that the engine does not take.
    """
    kind: type[Options] = TrtOptions if manifest.backend == "trt" else OrtOptions
    options = options or kind()
    if not isinstance(options, kind):
        raise SessionError(
            f"{directory}: built for backend '{manifest.backend}', which takes {kind.__name__}, not "
            f"{type(options).__name__}."
        )
    if isinstance(options, TrtOptions):
        return _prepare_trt(directory, manifest, batch, options)
    return _prepare_ort(directory, manifest, batch, options)


def _prepare_ort(directory: Path, manifest: Manifest, batch: int, options: OrtOptions) -> Prepared:
    if options.provider == "cpu":
        check_dtype(directory, manifest)
    remedy = f"build it again with `v4graph build GRAPH_DIR {directory} --backend ort`"
    check_file(directory, manifest, MODEL, remedy)

    def open_backend(weights: NamedArrays) -> Opened:
        states = state_tensors(manifest, batch)
        return Opened(OrtBackend(directory / MODEL, dict(weights), states, options), lambda: None)

    return Prepared(open_backend, keeps_weights=options.provider == "cpu")


def _prepare_trt(directory: Path, manifest: Manifest, batch: int, options: TrtOptions) -> Prepared:
    loadable = trt_backend.prepare(directory, manifest, batch, options)

    def open_backend(weights: NamedArrays) -> Opened:
        backend = loadable.open(weights)
        return Opened(backend, backend.close)

    return Prepared(open_backend, loadable.max_tokens)
