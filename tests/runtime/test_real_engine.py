"""The exporter's own graph, in v4 numerics, on a random checkpoint in the official format."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from engines import Built, export_and_build

from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import pack
from v4graph.errors import CheckpointError
from v4graph_export import ExportOptions
from v4graph_runtime import Session
from v4graph_runtime.ort_backend import OrtOptions

IDS = np.random.default_rng(3).integers(0, tiny.RAW["vocab_size"], (2, 40))
STEPS = ([30, 5], [1, 1], [0, 7], [2, 0], [1, 1])


def replay(session: Session) -> list[Any]:
    """Logits of a ragged schedule with a rollback after each step but the last."""
    logits = []
    for counts in STEPS:
        at = session.position
        chunk = np.stack([np.resize(IDS[slot, at[slot] :], 30) for slot in range(2)])
        logits.append(session.prefill(chunk[:, : max(counts)], counts))
        session.rollback(np.minimum(counts, 1))
        session.decode(IDS[range(2), session.position], np.minimum(counts, 1))
    return logits


def test_states_in_place_give_the_bits_of_two_buffers(official: Built) -> None:
    runs = []
    for in_place in (True, False):
        options = OrtOptions(in_place=in_place)
        runs.append(replay(Session(official.engine, official.checkpoint, batch=2, options=options)))
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_pieces_of_a_prompt_give_what_one_call_gives(official: Built) -> None:
    whole, pieces = (
        Session(official.engine, official.checkpoint, batch=2, prefill_chunk=chunk) for chunk in (512, 9)
    )
    # No elementwise limit in v4 numerics: one ulp can flip an FP8 bucket, and a bucket a top-k.
    first, second = whole.prefill(IDS, [40, 20]), pieces.prefill(IDS, [40, 20])
    assert np.median(np.abs(first - second)) < 1e-3
    np.testing.assert_array_equal(whole.position, pieces.position)


def mapped(array: Any) -> bool:
    """Whether an array's memory is a file's."""
    start = array.ctypes.data
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= start and start + array.nbytes <= high:
            return rest.endswith(".safetensors")
    return False


def test_weights_stay_in_a_packed_checkpoints_file(official: Built, tmp_path: Path) -> None:
    pack(official.checkpoint, tmp_path / "packed")
    session = Session(official.engine, tmp_path / "packed")
    bound = session._backend._bindings[0]._bound_inputs
    layouts = {name: binding.layout for binding in session.manifest.bindings for name, _ in binding.inputs()}
    copied = {name for name, array in session._backend._weights.items() if not mapped(array)}
    assert all(
        bound[name].data_ptr() == array.ctypes.data for name, array in session._backend._weights.items()
    )
    assert {layouts[name] for name in copied} <= {("cast",)}
    assert not any(name.endswith(("embed.weight", "head.weight", "wgate.weight")) for name in copied)
    assert sum(session._backend._weights[name].nbytes for name in copied) < 20_000


def test_another_models_checkpoint_is_refused_by_name(official: Built, tmp_path: Path) -> None:
    init(tiny.config(moe_intermediate_size=256), tmp_path / "wide", 1)
    with pytest.raises(CheckpointError, match=r"moe_intermediate_size|ffn"):
        Session(official.engine, tmp_path / "wide")


def test_an_engine_with_embedded_weights_needs_no_checkpoint(official: Built, tmp_path: Path) -> None:
    options = ExportOptions(max_seq_len=128, embed_weights=True)
    engine = export_and_build(tmp_path, official.checkpoint, options)
    session = Session(engine, None, batch=2)
    other = Session(official.engine, official.checkpoint, batch=2)
    expected = other.prefill(IDS)
    assert session.contract == other.contract
    assert dataclasses.asdict(session.manifest)["embedded_weights"]
    assert np.median(np.abs(session.prefill(IDS) - expected)) < 1e-3
