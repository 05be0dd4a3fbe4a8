"""The plugins are found through their entry point, and only through it."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from v4graph.errors import EngineError
from v4graph_runtime import plugin_host
from v4graph_runtime.plugin_host import GROUP, NAME, find_host


def install(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    found = [EntryPoint(NAME, value, GROUP) for value in values]
    monkeypatch.setattr(plugin_host, "entry_points", lambda **_: found)


def test_the_distribution_declares_a_host_that_keeps_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    value = tomllib.loads(pyproject.read_text())["project"]["entry-points"][GROUP][NAME]
    install(monkeypatch, value)
    host: Any = find_host()
    wanted = {name for name in vars(plugin_host.PluginHost) if not name.startswith("_")}
    assert wanted == {"findings", "capturable", "hashes", "problem", "register", "use_launcher"}
    assert all(hasattr(host, name) for name in wanted)
    assert host.findings.take() == []


def test_without_an_entry_point_there_is_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert find_host() is None


def test_a_host_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "no_such_plugins.host:Host")
    with pytest.raises(
        EngineError, match=r"no_such_plugins\.host:Host do not load \(ModuleNotFoundError: .*pip"
    ):
        find_host()
