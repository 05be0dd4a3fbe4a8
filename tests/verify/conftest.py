"""Graphs and engines to verify, made once: a random transformers model in exact numerics, nano in both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import pytest
from click.testing import CliRunner, Result
from engines import Built, oracle_engine
from graphs import export_nano

from v4graph.cli import main

Verify = Callable[..., Result]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Its graph is in the folder `graph` beside the engine."""
    return oracle_engine(tmp_path_factory.mktemp("oracle"), oracles.SMALL)


@pytest.fixture(scope="session")
def nano_v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano-v4") / "graph"
    return export_nano(folder, dtype="float32", all_logits=True, max_seq_len=512)


@pytest.fixture(scope="session")
def nano_exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano-exact") / "graph"
    return export_nano(folder, numerics="exact", dtype="float32", all_logits=True, max_seq_len=512)


@pytest.fixture
def verify(tmp_path: Path) -> Verify:
    """Run the command with reproducers in the test's folder."""

    def call(*arguments: Any) -> Result:
        saved = ("--save-repro", str(tmp_path / "repro.npz"))
        return CliRunner().invoke(main, ["verify", *map(str, arguments), *saved])

    return call
