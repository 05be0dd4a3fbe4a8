"""The trained nano model: quantised numerics judged where they matter, on language it never saw."""

from __future__ import annotations

import numpy as np
import torch
from agreement import agreement
from engines import NANO, Built

from v4graph.checkpoint import Checkpoint
from v4graph.config import PRESETS, ModelConfig
from v4graph_export.flavour import Flavour
from v4graph_export.reference import Reference, checkpoint_weights
from v4graph_runtime import Session
from v4graph_runtime.evaluate import score
from v4graph_runtime.tokenizer import Tokenizer

TOKENS = 512


def heldout(tokens: int) -> np.ndarray:
    """The first tokens of the held-out chapters, int64 [1, tokens]."""
    text = (NANO / "heldout.txt").read_text()
    ids = Tokenizer.load(NANO).encode(text[: 8 * tokens])
    return np.asarray(ids[:tokens], np.int64)[None]


def torch_logits(checkpoint: Checkpoint, ids: np.ndarray) -> np.ndarray:
    flavour = Flavour("v4", "float32", checkpoint.weights)
    reference = Reference(checkpoint.config, flavour, checkpoint_weights(checkpoint, flavour))
    return reference.step(torch.from_numpy(ids)).numpy()


def test_onnxruntime_equals_torch_in_v4_numerics(
    nano_v4: Built, nano_exact: Built, nano_checkpoint: Checkpoint
) -> None:
    ids = heldout(TOKENS)
    got = Session(nano_v4.engine, NANO).prefill(ids)
    same = agreement(got, torch_logits(nano_checkpoint, ids))
    exact = agreement(got, Session(nano_exact.engine, NANO).prefill(ids))
    print(f"\nv4 onnxruntime against v4 torch: {same}\nv4 onnxruntime against exact:    {exact}")
    assert same.mean_kl <= 1e-3
    assert same.argmax >= 0.99


def test_held_out_bits_per_byte_and_the_price_of_quantisation(nano_v4: Built, nano_exact: Built) -> None:
    tokenizer = Tokenizer.load(NANO)
    text = (NANO / "heldout.txt").read_text()[:24_000]
    exact, v4 = (
        score(Session(built.engine, NANO), tokenizer, text, window=TOKENS).bits_per_byte
        for built in (nano_exact, nano_v4)
    )
    print(f"\nheld-out bits per byte: exact {exact:.4f}, v4 {v4:.4f} ({v4 / exact - 1:+.2%})")
    assert exact <= 2.4
    assert v4 <= 1.05 * exact


def test_steps_agree_with_one_prefill_in_v4_numerics(nano_v4: Built) -> None:
    ids = heldout(300)
    session = Session(nano_v4.engine, NANO)
    whole = session.prefill(ids)
    session.reset()
    pieces = [session.prefill(ids[:, :150]), *(session.decode(ids[:, t]) for t in range(150, 280))]
    pieces.append(session.prefill(ids[:, 280:]))
    same = agreement(np.concatenate(pieces, 1), whole)
    print(f"\nsteps against one prefill: {same}")
    assert same.mean_kl <= 1e-3
    assert same.argmax >= 0.99


def test_the_nano_preset_is_the_config_of_the_checkpoint() -> None:
    assert "nano" in PRESETS
    assert ModelConfig.load("nano").raw == ModelConfig.load(NANO).raw


def test_nano_has_every_feature_and_the_real_head_geometry() -> None:
    config = ModelConfig.load("nano")
    assert {layer.attention for layer in config.layers} == {"window", "csa", "hca"}
    assert {layer.routing for layer in config.layers} == {"hash", "topk"}
    assert {layer.ratio for layer in config.layers} == {0, 4, 128}
    geometry = (config.head_dim, config.qk_rope_head_dim, config.index_head_dim, config.sliding_window)
    assert geometry == (512, 64, 128, 128)
    assert config.index_n_heads >= 16
    assert config.o_groups > 1
    assert config.hc_mult == 4
    stored = sum(path.stat().st_size for path in NANO.iterdir())
    assert stored <= 12_000_000
