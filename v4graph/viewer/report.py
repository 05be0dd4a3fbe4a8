"""A graph or engine directory as one JSON object: everything that the page shows.

A TensorRT plan cannot be opened; of an engine with one, the report has what its manifest says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from v4graph.manifest import Manifest, State
from v4graph.passes.measure import Step, measure
from v4graph.viewer.blocks import Json, label, layout, totals, varying
from v4graph.viewer.names import PARTS, Names

if TYPE_CHECKING:
    import onnx_ir as ir

CONTEXTS = (0, 4 << 10, 32 << 10, 128 << 10, 512 << 10, 1 << 20)
_NO_GRAPH = (
    "This engine is a TensorRT plan, which has no graph to open; shown is what its manifest says. "
    "View the graph directory that it was built from for ops, bytes and FLOPs."
)


@dataclass(frozen=True)
class Subject:
    """A directory to show; `model` is None for an engine without model.onnx."""

    path: Path
    manifest: Manifest
    model: ir.Model | None


def describe(subjects: Sequence[Subject], batch: int, tokens: int, context: int) -> Json:
    """Return the report of one or more directories; `chosen` is the index of `context` in `contexts`.

    Raises:
        EngineError: a graph whose figures cannot be found.
    """
    contexts = sorted({*CONTEXTS, context})
    return {
        "batch": batch,
        "tokens": tokens,
        "contexts": contexts,
        "chosen": contexts.index(context),
        "parts": list(PARTS),
        "graphs": [_graph(subject, batch, tokens, contexts) for subject in subjects],
    }


def _graph(subject: Subject, batch: int, tokens: int, contexts: Sequence[int]) -> Json:
    manifest = subject.manifest
    steps = [Step(batch, tokens, context, _capacity(manifest, context + tokens)) for context in contexts]
    report = {
        "path": str(subject.path),
        "model": model_name(manifest.config),
        "facts": _facts(manifest),
        "kind": manifest.kind,
        "backend": manifest.backend,
        "numerics": manifest.numerics,
        "dtype": manifest.dtype,
        "max_seq_len": manifest.max_seq_len,
        "rollback_slack": manifest.rollback_slack,
        "passes": list(manifest.passes),
        "notes": list(manifest.notes),
        "tools": dict(manifest.tools),
        "ops": dict(manifest.ops),
        "capacities": [step.capacity for step in steps],
        "states": _states(manifest, [step.capacity for step in steps]),
        "tensorrt": dataclasses.asdict(manifest.tensorrt) if manifest.tensorrt else None,
        "opened": subject.model is not None,
    }
    if subject.model is None:
        rows = manifest.layer_functions.items()
        kinds = [
            {"kind": name.removeprefix("V4Layer_"), "label": _layers(layers), "count": len(layers)}
            for name, layers in rows
        ]
        return report | {"notes": [_NO_GRAPH, *manifest.notes], "kinds": kinds}
    runs = [measure(subject.model, step) for step in steps]
    return report | layout(runs, Names.of(manifest)) | {"totals": totals(runs)}


def _capacity(manifest: Manifest, tokens: int) -> int:
    """Return the tokens that the caches are measured with: what the graph holds, or more if it must."""
    return max(manifest.max_seq_len, -(-tokens // 128) * 128)


def _layers(layers: Sequence[int]) -> str:
    return label([f"layers.{i}" for i in layers])


def model_name(config: Json) -> str:
    """Return the name of the preset with this config, or the architecture."""
    for path in resources.files("v4graph").joinpath("presets").iterdir():
        if path.name.endswith(".config.json") and json.loads(path.read_text()) == config:
            return f"DeepSeek-V4 {path.name.partition('.')[0].capitalize()}"
    return str(next(iter(config.get("architectures") or ()), config.get("model_type", "model")))


def _facts(manifest: Manifest) -> list[str]:
    """Return the model's size in words."""
    layers = sum(len(layers) for layers in manifest.layer_functions.values())
    shown = (
        ("hidden_size", "hidden {:,}"),
        ("vocab_size", "vocabulary {:,}"),
        ("n_routed_experts", "{:,} experts"),
        ("num_experts_per_tok", "{:,} per token"),
    )
    found = [text.format(manifest.config[key]) for key, text in shown if key in manifest.config]
    return [f"{layers} layers", *found]


def _states(manifest: Manifest, capacities: Sequence[int]) -> list[Json]:
    """Return the state tensors by name, ratio and dtype; bytes are of one slot and all layers of the row."""
    return [
        {
            "name": state.name.replace("state.{i}.", ""),
            "layers": _layers(state.layers),
            "count": len(state.layers),
            "ratio": state.ratio,
            "rule": state.rule,
            "dtype": state.dtype,
            "width": int(state.shape[-1]),
            "rows": state.rows(manifest.max_seq_len),
            "bytes": _bytes(state, state.rows(manifest.max_seq_len)),
            "bytes_at": varying([_bytes(state, state.rows(capacity)) for capacity in capacities]),
        }
        for state in manifest.states
    ]


def _bytes(state: State, rows: int) -> int:
    dtype = np.dtype(ml_dtypes.bfloat16) if state.dtype == "bfloat16" else np.dtype(state.dtype)
    width = int(state.shape[-1])
    return len(state.layers) * rows * width * int(dtype.itemsize)
