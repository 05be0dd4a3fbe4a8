"""Engines made through the public API, for end-to-end tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracles

from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph
from v4graph_runtime.build import build_engine

REPO = Path(__file__).resolve().parents[2]
NANO = REPO / "models" / "nano"


@dataclass(frozen=True)
class Built:
    """An engine and the checkpoint it was exported from; `oracle` is the transformers model, if any."""

    engine: Path
    checkpoint: Path
    oracle: Any = None


def export_and_build(folder: Path, checkpoint: Path, options: ExportOptions) -> Path:
    """Run both stages and return the engine directory."""
    export_graph(resolve(str(checkpoint)), folder / "graph", options)
    build_engine(folder / "graph", folder / "engine")
    return folder / "engine"


def oracle_engine(folder: Path, case: oracles.Case, seed: int = 1234) -> Built:
    """Build a random transformers model, save it as a user would, and make an exact engine of it."""
    model = oracles.build(case, seed)
    checkpoint = oracles.save(model, folder / "hf")
    options = ExportOptions(numerics="exact", max_seq_len=384, all_logits=True)
    return Built(export_and_build(folder, checkpoint, options), checkpoint, model)
