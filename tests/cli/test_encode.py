"""`v4graph encode` prints prompts and their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from v4graph.cli import main

Cli = Callable[..., Result]
NANO = Path(__file__).resolve().parents[2] / "models" / "nano"
MESSAGES = [{"role": "user", "content": "Hé"}]
PROMPT = "<｜begin▁of▁sentence｜><｜User｜>Hé<｜Assistant｜></think>"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(MESSAGES), "utf-8")
    return path


def test_the_prompt_is_printed(cli: Cli, file: Path) -> None:
    result = cli("encode", file)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{PROMPT}\n", "")
    assert cli("encode", file, "--mode", "thinking").stdout.endswith("<think>\n")
    assert "Absolute maximum" in cli("encode", file, "--mode", "max").stdout


def test_messages_come_from_standard_input_and_with_tools() -> None:
    conversation = {"messages": MESSAGES, "tools": [{"function": {"name": "now"}}]}
    result = CliRunner().invoke(main, ["encode", "-"], input=json.dumps(conversation))
    assert '\n{"name": "now"}\n' in result.stdout


def test_reasoning_is_kept_on_demand(cli: Cli, file: Path) -> None:
    answer = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    file.write_text(json.dumps([*MESSAGES, answer, *MESSAGES]))
    assert "R</think>" not in cli("encode", file, "--mode", "thinking").stdout
    assert "R</think>" in cli("encode", file, "--mode", "thinking", "--keep-thinking").stdout


def test_tokens_are_counted_and_a_tokenizer_without_chat_is_told(cli: Cli, file: Path) -> None:
    printed = cli("encode", file, "--tokens", "--tokenizer", NANO)
    assert printed.exit_code == 0
    value = json.loads(cli("encode", file, "--json", "--tokenizer", NANO).stdout)
    assert [int(i) for i in printed.stdout.split()] == value["ids"]
    assert value["prompt"] == PROMPT
    assert (value["tokens"], value["characters"]) == (len(value["ids"]), len(PROMPT))
    assert f"{value['tokens']} tokens, {len(PROMPT)} characters\n" in printed.stderr
    assert "no token for <｜begin▁of▁sentence｜>, <｜User｜>, <｜Assistant｜>, </think>\n" in printed.stderr
    assert "ids" not in json.loads(cli("encode", file, "--json").stdout)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[{"role": "usr"}]', "Error: messages[0]: unknown role 'usr'; did you mean 'user'? Use one of"),
        ("[", "messages.json: not JSON (Expecting value"),
        ("[" * 100_000, "messages.json: not JSON (maximum recursion"),
        (None, "messages.json: No such file or directory; name a file of messages."),
    ],
)
def test_a_bad_file_is_refused_in_a_line(cli: Cli, file: Path, text: str | None, sentence: str) -> None:
    file.unlink() if text is None else file.write_text(text)
    result = cli("encode", file)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert sentence in result.stderr


def test_tokens_without_a_tokenizer_say_what_to_give(cli: Cli, file: Path) -> None:
    assert "name its directory with --tokenizer DIR" in cli("encode", file, "--tokens").stderr
