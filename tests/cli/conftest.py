"""A small random checkpoint, its graph and its engine, made once by the commands under test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from v4graph.cli import main

NANO = Path(__file__).resolve().parents[2] / "models" / "nano"
Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run one command line in this process."""
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "random"
    assert cli("init", NANO, folder, "--seed", 1, "--layers", 3).exit_code == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def graph(checkpoint: Path, cli: Cli) -> Path:
    folder = checkpoint.parent / "graph"
    result = cli("export", checkpoint, folder, "--max-seq-len", 128, "--all-logits")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session")
def engine(graph: Path, cli: Cli) -> Path:
    folder = graph.parent / "engine"
    result = cli("build", graph, folder, "--backend", "ort")
    assert result.exit_code == 0, result.output
    return folder
