"""`v4graph bench` on a small engine: figures that fit each other, a file of rows, and clear refusals."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from v4graph_runtime import cpu_kernels

Cli = Callable[..., Result]
SHORT = ("--prompt", 8, "--context", 4, "--tokens", 2, "--rounds", 1, "--threads", 1)


@pytest.fixture(autouse=True)
def library() -> None:
    cpu_kernels.build_library(cpu_kernels.find_compiler())


def test_figures_fit_each_other(cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    for _ in range(2):
        result = cli(
            "bench",
            engine,
            "--checkpoint",
            checkpoint,
            *SHORT,
            "--against",
            "bodies",
            "--csv",
            rows,
            "--json",
        )
        assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    ours, bodies = found["sides"]
    assert (ours["side"], bodies["side"]) == ("engine", "bodies")
    assert ours["prefill_tokens_per_second"] == pytest.approx(8 / ours["prefill_seconds"])
    read = found["weight_bytes_per_token"] / ours["decode_seconds"]
    assert ours["weight_bytes_per_second"] == pytest.approx(read)
    ratio = bodies["decode_seconds"] / ours["decode_seconds"]
    assert bodies["engine_is_faster"]["decode"] == pytest.approx(ratio)
    assert found["read_bytes_per_second"] > 0
    assert found["peak_rss_bytes"] > found["state_bytes"] > 0
    with rows.open() as file:
        table = list(csv.DictReader(file))
    assert [row["side"] for row in table] == ["engine", "bodies"] * 2
    assert float(table[-1]["decode_s"]) == pytest.approx(bodies["decode_seconds"], abs=1e-6)


def test_a_load_that_the_state_does_not_hold_is_refused(cli: Cli, engine: Path, checkpoint: Path) -> None:
    result = cli("bench", engine, "--checkpoint", checkpoint, "--context", 120, "--tokens", 20)
    assert result.exit_code == 2
    assert "holds 128 tokens, the benchmark needs" in result.stderr
    assert "--max-seq-len" in result.stderr


def test_transformers_refuses_a_quantised_checkpoint_in_a_sentence(
    cli: Cli, engine: Path, checkpoint: Path
) -> None:
    result = cli("bench", engine, "--checkpoint", checkpoint, *SHORT, "--against", "transformers")
    assert result.exit_code == 2
    assert "transformers" in result.stderr
    assert "Traceback" not in result.stderr
