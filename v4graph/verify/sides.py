"""What can be compared: a checkpoint in torch, a graph, an engine, a model in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from v4graph.errors import EngineError, V4GraphError, near_match
from v4graph.manifest import FILE_NAME, FloatType, Manifest, Numerics
from v4graph.verify.random_inputs import Array
from v4graph.verify.schedules import Call, chunk_of

if TYPE_CHECKING:
    from v4graph.checkpoint import Checkpoint
    from v4graph_runtime import bench

Kind = Literal["checkpoint", "graph", "engine", "transformers"]
KINDS: tuple[Kind, ...] = ("checkpoint", "graph", "engine", "transformers")
# Appends tokens [B, S], counts [B] of them valid; returns logits [B, S, V], or [B, V] of the last valid ones.
Append = Callable[[Array, Sequence[int]], Array]


@dataclass(frozen=True)
class Side:
    """One implementation: its kind, folder, and (where it has one) manifest; `weights` is its checkpoint.

    `numerics` and `dtype` are what it computes in; of a checkpoint in torch they can be chosen.
    """

    kind: Kind
    folder: Path
    numerics: Numerics
    dtype: FloatType
    manifest: Manifest | None = None
    weights: Checkpoint | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What reports call it."""
        where = {"checkpoint": "torch", "graph": "onnxruntime", "engine": "engine"}.get(self.kind, self.kind)
        return f"{where} {self.numerics} {self.dtype} ({self.folder})"

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        if self.manifest is not None:
            return int(self.manifest.outputs[0].shape[-1])
        assert self.weights is not None
        return self.weights.config.vocab_size


def parse(text: str) -> tuple[Kind, Path]:
    """Return kind and folder of `DIR` or `KIND:DIR`.

    Raises:
        V4GraphError: no such folder, or a folder that holds none of the kinds.
    """
    prefix, colon, rest = text.partition(":")
    if colon and prefix in KINDS:
        return prefix, Path(rest)
    if colon and not Path(text).exists():
        raise V4GraphError(
            f"{text}: '{prefix}' is no kind{near_match(prefix, KINDS)}; there are {', '.join(KINDS)}."
        )
    folder = Path(text)
    if (folder / FILE_NAME).is_file():
        return Manifest.load(folder).kind, folder
    if folder.is_file() or (folder / "config.json").is_file():
        return "checkpoint", folder
    raise V4GraphError(
        f"{text}: neither a checkpoint nor a graph or engine directory; give a folder with config.json and "
        "safetensors, or one that `v4graph export` or `v4graph build` wrote."
    )


def open_side(text: str, checkpoint: Checkpoint | None, numerics: Numerics | None, dtype: FloatType) -> Side:
    """Open one side; `numerics` and `dtype` are for a checkpoint in torch (None: v4 if it is quantised).

    Raises:
        V4GraphError: it cannot be opened; the text says why.
    """
    from v4graph.checkpoint import Checkpoint

    kind, folder = parse(text)
    if kind in ("graph", "engine"):
        manifest = Manifest.load(folder, kind="graph" if kind == "graph" else "engine")
        weights = None if manifest.embedded_weights else checkpoint
        return Side(kind, folder, manifest.numerics, manifest.dtype, manifest, weights)
    weights = Checkpoint.open(folder)
    if kind == "transformers":
        return Side(kind, folder, "exact", "float32", weights=weights)
    chosen = numerics or ("v4" if weights.weights.quantised else "exact")
    return Side(kind, folder, chosen, dtype, weights=weights)


def with_weights(side: Side, other: Side) -> Side:
    """Give a graph or engine the other side's checkpoint where it has none of its own."""
    if side.manifest is None or side.manifest.embedded_weights or side.weights is not None:
        return side
    return dataclasses.replace(side, weights=other.weights)


def logits(side: Side, ids: Array, calls: Sequence[Call], slack: int = 0) -> Array:
    """Return logits float32 [B, S, V] of a schedule; NaN where a side gives none. The last answer counts."""
    if side.kind == "transformers":
        return _transformers(side, ids)
    found = np.full((*ids.shape, side.vocabulary), np.nan, np.float32)
    append, rollback = opened(side, ids.shape[0], ids.shape[1])
    position = np.zeros(ids.shape[0], np.int64)
    for call in calls:
        rows = append(chunk_of(ids, position, call.counts), call.counts)
        for slot, count in enumerate(call.counts):
            start = position[slot]
            if count and rows.ndim == 3:
                found[slot, start : start + count] = rows[slot, :count]
            elif count:
                found[slot, start + count - 1] = rows[slot]
        position += call.counts
        if any(call.back):
            rollback(np.array(call.back))
            position -= call.back
    return found


def opened(side: Side, batch: int, tokens: int) -> tuple[Append, Callable[[Array], None]]:
    """Return what appends tokens to empty slots of a side, and what takes some back."""
    openers = {"checkpoint": _reference, "graph": _graph, "engine": _engine}
    return openers[side.kind](side, batch, tokens)


def _reference(side: Side, batch: int, tokens: int) -> tuple[Append, Callable[[Array], None]]:
    import torch

    from v4graph_export.flavour import Flavour, check_flavour
    from v4graph_export.reference import Reference, checkpoint_weights

    assert side.weights is not None
    config, flavour = side.weights.config, Flavour(side.numerics, side.dtype, side.weights.weights)
    check_flavour(config, flavour, str(side.folder))
    weights = checkpoint_weights(side.weights, flavour)
    reference = Reference(config, flavour, weights, batch=batch, capacity=tokens)

    def append(ids: Array, counts: Sequence[int]) -> Array:
        rows = reference.step(torch.from_numpy(ids), torch.tensor(counts, dtype=torch.int32))
        found: Array = rows.float().numpy()
        return found

    def rollback(counts: Array) -> None:
        reference.position = reference.position - torch.from_numpy(counts).int()

    return append, rollback


def _graph(side: Side, batch: int, tokens: int) -> tuple[Append, Callable[[Array], None]]:
    from v4graph.passes.graph_dir import load_graph
    from v4graph.verify.graph_runner import GraphRunner, bound_weights

    model, manifest = load_graph(side.folder)
    check_fits(side, tokens)
    weights = bound_weights(manifest, side.weights, str(side.folder))
    runner = GraphRunner(model, manifest, weights, batch, side.folder)

    def rollback(counts: Array) -> None:
        runner.position -= counts

    return lambda ids, counts: runner.step(ids, counts)["logits"], rollback


def _engine(side: Side, batch: int, tokens: int) -> tuple[Append, Callable[[Array], None]]:
    from v4graph_runtime import Session

    assert side.manifest is not None
    check_fits(side, tokens)
    session = Session(side.folder, side.weights, batch=batch)
    return lambda ids, counts: session.prefill(ids, np.array(counts)), session.rollback


def check_fits(side: Side, tokens: int) -> None:
    """Refuse a sequence longer than a graph or engine holds.

    Raises:
        EngineError: it is.
    """
    manifest = side.manifest
    if manifest is not None and tokens > manifest.max_seq_len:
        raise EngineError(
            f"{side.folder}: holds {manifest.max_seq_len} tokens, the sequence has {tokens}; give fewer "
            "tokens, or export with a larger --max-seq-len."
        )


def _transformers(side: Side, ids: Array) -> Array:
    import torch

    model = _transformers_model(side.folder)
    with torch.no_grad():
        found: Array = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.float().numpy()
    return found


def transformers_side(folder: Path, threads: int) -> bench.Side:
    """Return a checkpoint in transformers (eager, float32, with its cache) to be timed by `v4graph bench`.

    Raises:
        EngineError: transformers is not installed, or does not load the checkpoint.
    """
    import torch

    from v4graph_runtime.bench import Side as Timed

    model = _transformers_model(folder)
    torch.set_num_threads(threads)
    cache: list[Any] = []

    def append(ids: Array) -> object:
        with torch.no_grad():
            past = cache[0] if cache else None
            out = model(
                input_ids=torch.from_numpy(ids), past_key_values=past, use_cache=True, logits_to_keep=1
            )
        cache[:] = [out.past_key_values]
        return out.logits.numpy()

    return Timed("transformers", cache.clear, append)


def _transformers_model(folder: Path) -> Any:
    import torch

    try:
        import transformers
    except ModuleNotFoundError as error:
        raise EngineError(
            "comparing with transformers needs that package; install it with `pip install transformers`."
        ) from error
    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, torch_dtype=torch.float32, attn_implementation="eager"
        )
    except Exception as error:  # transformers raises what it likes
        raise EngineError(f"{folder}: transformers cannot load it ({error}).") from error
    return model.eval()
