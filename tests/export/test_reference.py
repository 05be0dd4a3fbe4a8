"""The eager torch model: equal to transformers in exact numerics, close to itself in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from agreement import agreement
from engines import NANO

from v4graph.checkpoint import Checkpoint
from v4graph_export.flavour import Flavour
from v4graph_export.reference import Reference, checkpoint_weights


def logits(checkpoint: Checkpoint, flavour: Flavour, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    weights = checkpoint_weights(checkpoint, flavour)
    reference = Reference(checkpoint.config, flavour, weights, batch=ids.shape[0], capacity=384)
    return torch.cat([reference.step(part) for part in ids.split(cuts, 1)], 1)


@pytest.mark.parametrize("cuts", [[93], [1, 3, 4, 8, 16, 61]], ids=["prefill", "chunks"])
def test_exact_reference_equals_transformers(tmp_path: Path, cuts: list[int]) -> None:
    oracle = oracles.build(oracles.SMALL, seed=11)
    checkpoint = Checkpoint.open(oracles.save(oracle, tmp_path / "hf"))
    ids = torch.randint(0, oracles.SMALL.vocab, (2, 93), generator=torch.Generator().manual_seed(3))
    got = logits(checkpoint, Flavour("exact", "float32", checkpoint.weights), ids, cuts)
    assert (got - oracles.full_logits(oracle, ids)).abs().max() <= 1e-4


def test_bf16_rounding_moves_the_nano_model_little() -> None:
    checkpoint = Checkpoint.open(NANO)
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 500, (1, 160)))
    want, got = (
        logits(checkpoint, Flavour("v4", dtype, checkpoint.weights), ids, [160])
        for dtype in ("float32", "bfloat16")
    )
    same = agreement(got.numpy(), want.numpy())
    print(f"\nbf16 against fp32, both v4, random tokens: {same}")
    assert same.mean_kl <= 2e-2
