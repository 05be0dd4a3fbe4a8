"""Models of one layer of each kind at V4-Flash's widths, and the torch reference's logits of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from nano_schedules import Ids, Logits

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.config import ModelConfig
from v4graph.manifest import FloatType
from v4graph.verify.schedules import Call
from v4graph.verify.sides import Side, logits

EXPERTS, VOCABULARY = 8, 1280
# compress_ratios and num_hash_layers of one layer.
KINDS = {"window_hash": (0, 1), "csa_hash": (4, 1), "hca_topk": (128, 0), "csa_topk": (4, 0)}


def checkpoint(kind: str, folder: Path) -> Path:
    """Write random weights of one layer in the official FP8 and FP4 form (0.2 GB)."""
    ratio, hashed = KINDS[kind]
    raw = ModelConfig.load("flash").shrink(layers=1, experts=EXPERTS).raw
    raw |= {"vocab_size": VOCABULARY, "num_nextn_predict_layers": 0, "num_hash_layers": hashed}
    raw["compress_ratios"] = [ratio]
    init(ModelConfig.from_dict(raw, source=f"flash, one {kind} layer"), folder, 1)
    return folder


def texts(tokens: int) -> Ids:
    """Return random ids [2, tokens]."""
    return np.random.default_rng(4).integers(0, VOCABULARY, (2, tokens))


def reference(folder: Path, ids: Ids, dtype: FloatType) -> Logits:
    """Return the torch reference's logits [2, S, V] in v4 numerics, all tokens at once."""
    side = Side("checkpoint", folder, "v4", dtype, weights=Checkpoint.open(folder))
    found: Logits = logits(side, ids, [Call((ids.shape[1],) * 2, (0, 0))])
    return found


def error(got: Logits, want: Logits) -> float:
    """Return the root mean square of the difference by that of the logits."""
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))
