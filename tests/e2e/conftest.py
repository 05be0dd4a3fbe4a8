"""Engines that several end-to-end tests share, built once per run."""

from __future__ import annotations

import oracles
import pytest
from engines import NANO, Built, export_and_build, oracle_engine

from v4graph.checkpoint import Checkpoint
from v4graph_export import ExportOptions


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return oracle_engine(tmp_path_factory.mktemp("small"), oracles.SMALL)


@pytest.fixture(scope="session")
def real_ratios(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return oracle_engine(tmp_path_factory.mktemp("real"), oracles.REAL_RATIOS)


@pytest.fixture(scope="session")
def nano_v4(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("nano-v4")
    return Built(export_and_build(folder, NANO, ExportOptions(max_seq_len=1024, all_logits=True)), NANO)


@pytest.fixture(scope="session")
def nano_exact(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("nano-exact")
    options = ExportOptions(numerics="exact", max_seq_len=1024, all_logits=True)
    return Built(export_and_build(folder, NANO, options), NANO)


@pytest.fixture(scope="session")
def nano_checkpoint() -> Checkpoint:
    return Checkpoint.open(NANO)
