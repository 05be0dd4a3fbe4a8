"""Help, usage errors, and how errors reach the user."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import Result

from v4graph.cli import main
from v4graph.cli.output import extra, size, table
from v4graph.errors import ConfigError, EngineError

Cli = Callable[..., Result]
COMMANDS = (
    *("plan", "export", "optimize", "passes", "build", "encode", "run", "chat", "serve", "eval"),
    *("bench", "verify", "inspect", "view", "init", "pack", "kernels", "doctor"),
)


def test_commands_are_listed_in_the_order_of_the_pipeline(cli: Cli) -> None:
    assert tuple(main.commands) == COMMANDS
    text = cli("--help").stdout
    assert [text.index(f"\n  {name} ") for name in COMMANDS] == sorted(
        text.index(f"\n  {name} ") for name in COMMANDS
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_teaches_with_an_example(cli: Cli, command: str) -> None:
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert f"  v4graph {command} " in result.stdout
    assert "--json" in result.stdout


def test_version_is_the_packages(cli: Cli) -> None:
    from v4graph import __version__

    assert cli("--version").stdout == f"v4graph, version {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuch",),
        ("export", "flash"),
        ("export", "flash", "out", "--numerics", "fast"),
        ("export", "flash", "out", "--max-seq-len", "0"),
        ("build", "graph", "engine", "--backend", "tensorrt"),
        ("run", "engine"),
    ],
)
def test_usage_errors_exit_with_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_a_user_error_is_one_line_even_if_its_text_is_not(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise ConfigError("first line;\n  second line.")

    monkeypatch.setattr("v4graph.source.resolve", refuse)
    result = cli("inspect", "flash")
    assert (result.exit_code, result.stderr) == (2, "Error: first line; second line.\n")


def test_an_unexpected_error_keeps_its_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("v4graph.source.resolve", fail)
    result = cli("inspect", "flash")
    assert isinstance(result.exception, ZeroDivisionError)


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    message = r"'torch'; install it with `pip install 'v4graph\[export\]'`"
    with pytest.raises(EngineError, match=message), extra("export"):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def test_a_missing_module_of_our_own_is_no_user_error() -> None:
    with pytest.raises(ModuleNotFoundError), extra("export"):
        raise ModuleNotFoundError("No module named 'v4graph_export'", name="v4graph_export")


def test_tables_align_text_left_and_integers_right() -> None:
    assert list(table([("a", 1_234, "bytes"), ("bcd", 5, "bytes")], 1)) == [
        " a    1,234  bytes",
        " bcd      5  bytes",
    ]
    assert list(table([])) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (864_704_792_696, "864.7 GB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_in_decimal_units(count: float, text: str) -> None:
    assert size(count) == text
