"""verify on sides that agree: torch, onnxruntime, transformers, engines; and what it says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from engines import NANO, Built
from graphs import export_nano

from v4graph.verify.compare import Limits, compare
from v4graph.verify.schedules import ragged, schedule

Verify = Callable[..., Result]


def report(result: Result) -> dict[str, object]:
    found: dict[str, object] = json.loads(result.stdout)
    return found


def test_torch_and_onnxruntime_agree_in_exact_numerics(nano_exact: Path, verify: Verify) -> None:
    result = verify(NANO, nano_exact, "--schedule", "prefill", "--schedule", "decode", "--tokens", 40)
    assert result.exit_code == 0, result.output
    assert "they agree (max difference 0.0001)" in result.stdout
    assert result.stdout.startswith(
        f"A: torch exact float32 ({NANO})\nB: onnxruntime exact float32 ({nano_exact})"
    )


def test_torch_and_onnxruntime_agree_in_v4_numerics(nano_v4: Path, verify: Verify) -> None:
    result = verify(nano_v4, NANO, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["schedule"] for row in found["schedules"]] == ["prefill", "ragged"]
    assert all(row["positions"] == 2 * 96 and row["mean_kl"] < 5e-3 for row in found["schedules"])


def test_transformers_and_onnxruntime_agree(oracle: Built, verify: Verify) -> None:
    for side in (oracle.engine, oracle.engine.parent / "graph"):
        result = verify(f"transformers:{oracle.checkpoint}", side, "--tokens", 60)
        assert result.exit_code == 0, result.output


def test_torch_agrees_with_transformers(oracle: Built, verify: Verify) -> None:
    result = verify(
        oracle.checkpoint, f"transformers:{oracle.checkpoint}", "--numerics", "exact", "--tokens", 40
    )
    assert result.exit_code == 0, result.output


def test_a_graph_with_the_last_logits_only_is_compared_where_it_has_them(
    tmp_path: Path, verify: Verify
) -> None:
    graph = export_nano(tmp_path / "graph", numerics="exact", dtype="float32", max_seq_len=128)
    result = verify(NANO, graph, "--schedule", "ragged", "--tokens", 30, "--json")
    assert result.exit_code == 0, result.output
    positions = json.loads(result.stdout)["schedules"][0]["positions"]
    assert 2 <= positions < 60


def test_a_bf16_graph_runs_as_its_float32_twin(tmp_path: Path, verify: Verify) -> None:
    graph = export_nano(tmp_path / "graph", all_logits=True, max_seq_len=128)
    result = verify(NANO, graph, "--tokens", 40, "--schedule", "prefill")
    assert result.exit_code == 0, result.output


def test_any_schedule_holds_on_graph_and_engine(oracle: Built, nano_v4: Path, verify: Verify) -> None:
    for side, checkpoint in ((oracle.engine, oracle.checkpoint), (nano_v4, NANO)):
        result = verify(side, "--schedules", 4, "--checkpoint", checkpoint, "--tokens", 80)
        assert result.exit_code == 0, result.output
        assert "worst of 4" in result.stdout


def test_prompts_and_ids_are_fed(nano_exact: Path, verify: Verify, tmp_path: Path) -> None:
    result = verify(
        NANO, nano_exact, "--prompt", "In the beginning", "--per-position", "--schedule", "prefill"
    )
    assert "  slot 0 token 0: max difference" in result.stdout
    (tmp_path / "ids.json").write_text("[[5, 9, 300], [1, 2, 3]]")
    result = verify(NANO, nano_exact, "--ids", tmp_path / "ids.json", "--json")
    assert json.loads(result.stdout)["schedules"][0]["positions"] == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give two sides A and B, or one side with --schedules, or --repro FILE"),
        (
            ("{nano}", "/nowhere"),
            "/nowhere: neither a checkpoint nor a graph or engine directory; give a folder",
        ),
        (("{nano}", "grph:{graph}"), "'grph' is no kind; did you mean 'graph'?"),
        (("{graph}", "{graph}"), "holds no weights; name their checkpoint with --checkpoint DIR"),
        (
            ("{nano}", "{graph}", "--tokens", "4000"),
            "holds 512 tokens, the sequence has 4000; give fewer tokens",
        ),
        (("{nano}", "{graph}", "--ids", "{nano}/config.json"), "not a JSON list of token ids"),
        (("--repro", "{nano}/config.json"), "not a reproducer of this v4graph"),
        (("transformers:{nano}", "--schedules"), "transformers has one schedule only"),
    ],
)
def test_what_cannot_be_compared_is_said(
    nano_exact: Path, verify: Verify, arguments: tuple[str, ...], said: str
) -> None:
    result = verify(*(text.format(nano=NANO, graph=nano_exact) for text in arguments))
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.output.split())


def test_exact_against_quantised_shows_the_quantisation(
    nano_exact: Path, nano_v4: Path, verify: Verify
) -> None:
    """On the text that nano knows; on random tokens it is larger, and said to be that."""
    text = (NANO / "heldout.txt").read_text()[:800]
    known = verify(nano_exact, nano_v4, "--checkpoint", NANO, "--prompt", text, "--schedule", "prefill")
    assert known.exit_code == 0, known.output
    strict = verify(nano_exact, nano_v4, "--checkpoint", NANO, "--kl", 1e-6, "--tokens", 20)
    assert strict.exit_code == 1
    assert "one side is exact, the other v4, and every op agrees" in strict.stdout


def test_another_model_is_refused(oracle: Built, nano_exact: Path, verify: Verify) -> None:
    result = verify(oracle.checkpoint, nano_exact, "--checkpoint", NANO)
    assert result.exit_code == 2
    assert "token ids" in result.output


def test_schedules_feed_every_token_once_or_again() -> None:
    for name in ("prefill", "decode", "ragged"):
        assert np.sum([call.counts for call in schedule(name, 3, 50)], 0).tolist() == [50] * 3
    generator = np.random.default_rng(0)
    for _ in range(50):
        position, furthest = np.zeros(3, int), np.zeros(3, int)
        for call in ragged(3, 70, generator, slack=8):
            position += call.counts
            furthest = np.maximum(furthest, position)
            position -= call.back
            assert (furthest - position <= 8).all()
            assert (position >= 0).all()
        assert position.tolist() == [70] * 3


def test_agreement_is_measured_where_both_sides_speak() -> None:
    a = np.zeros((1, 3, 4), np.float32)
    a[0, :, 1] = 1
    b = a.copy()
    b[0, 1] = np.nan
    b[0, 2, 1] += 0.5
    found = compare(a, b)
    assert found.positions == 2
    assert found.max_difference == pytest.approx(0.5)
    assert found.argmax == 1
    assert not found.holds(Limits(exact=True))
    assert compare(a, a).holds(Limits(exact=True))
    b[0, 0, 0] = np.nan  # one NaN among numbers is no missing answer
    assert not compare(a, b).holds(Limits(exact=False))
