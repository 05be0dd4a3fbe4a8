"""Nano over schedules, on held-out text and teacher-forced, against onnxruntime's float32 logits."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from agreement import agreement
from engines import NANO, export_and_build

from v4graph_export import ExportOptions
from v4graph_runtime import Session, Tokenizer

# Past the window (128), past two blocks of 128 (HCA) and many of 4 (CSA).
CAPACITY, PREFILL, DECODE, DOCUMENT = 512, 300, 150, 3000
MEAN_KL, ARGMAX = 5e-3, 0.98
# Two best logits that float32 itself has closer than this are a coin's toss in bf16.
DECIDED = 0.05
Ids = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


class Nano(Protocol):
    """Nano with a state of two slots; `run` returns logits [2, S, V] of a chunk for every slot."""

    def run(self, ids: Ids, start: Int32, num: Int32) -> Logits: ...


def held_out() -> Ids:
    """Return two stretches of held-out text [2, PREFILL]."""
    ids = np.asarray(Tokenizer.load(NANO).encode((NANO / "heldout.txt").read_text()))
    return np.stack([ids[:PREFILL], ids[DOCUMENT:][:PREFILL]])


def float32_logits(folder: Path, ids: Ids) -> Logits:
    """Return onnxruntime's logits [2, S, V], v4 numerics."""
    options = ExportOptions(numerics="v4", max_seq_len=CAPACITY, all_logits=True)
    logits: Logits = Session(export_and_build(folder, NANO, options), NANO, batch=2).prefill(ids)
    return logits


def check(got: Logits, want: Logits) -> None:
    """Assert a small mean KL, and the same argmax where float32 is decided."""
    found = agreement(got, want)
    best = np.sort(want, -1)[..., -2:]
    decided = best[..., 1] - best[..., 0] > DECIDED
    share = float((got.argmax(-1) == want.argmax(-1))[decided].mean())
    print(f"{found}; {share:.2%} of the {decided.mean():.1%} decided by more than {DECIDED}")
    assert found.mean_kl <= MEAN_KL, found
    assert share >= ARGMAX, found


def step_by_step(model: Nano, ids: Ids) -> Logits:
    """Return logits of ids [2, S] decoded one by one."""
    one = np.ones(2, np.int32)
    return np.concatenate([model.run(ids[:, t : t + 1], t * one, one) for t in range(ids.shape[1])], 1)


def at_once(model: Nano, ids: Ids) -> Logits:
    """Return logits of ids [2, S] in one prefill."""
    return model.run(ids, np.zeros(2, np.int32), np.full(2, ids.shape[1], np.int32))


def in_ragged_pieces(model: Nano, ids: Ids, vocabulary: int) -> Logits:
    """Return logits of ids [2, S], with idle slots and rejected tokens: new ones start where those began."""
    random, at, total = np.random.default_rng(3), np.zeros(2, np.int32), ids.shape[1]
    got = np.zeros((2, total, vocabulary), np.float32)
    while at.min() < total:
        length = int(random.choice([1, 5, 40, 60]))
        counts = np.minimum(random.integers(0, length + 1, 2), total - at).astype(np.int32)
        counts[at.argmin()] = min(length, total - int(at.min()))
        piece = np.stack([np.resize(ids[b, p : p + length], length) for b, p in enumerate(at % total)])
        # Up to four tokens that turn out wrong.
        model.run((piece + 1) % 256, at, np.minimum(counts, 4))
        logits = model.run(piece, at, counts)
        for slot, count in enumerate(counts):
            got[slot, at[slot] : at[slot] + count] = logits[slot, :count]
        at = at + counts
    return got
