"""`v4graph chat` on a random model: its words mean nothing, what is done with them does."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from v4graph.cli import main
from v4graph.cli.chat_files import files_prompt
from v4graph.cli.ctrl_c import CtrlC


@pytest.fixture(scope="session")
def long_engine(checkpoint: Path) -> Path:
    """Conversations in nano's tokens, which spell control tokens letter by letter, are long."""
    folder = checkpoint.parent
    for line in (
        ("export", checkpoint, folder / "long.graph", "--max-seq-len", "1024"),
        ("build", folder / "long.graph", folder / "long.engine", "--backend", "ort"),
    ):
        result = CliRunner().invoke(main, [str(one) for one in line])
        assert result.exit_code == 0, result.output
    return folder / "long.engine"


@pytest.fixture
def talk(long_engine: Path, checkpoint: Path) -> Any:
    def run(*arguments: Any, lines: str = "") -> Result:
        line = ["chat", long_engine, "--checkpoint", checkpoint, "--max-new-tokens", 6, *arguments]
        return CliRunner().invoke(main, [str(one) for one in line], input=lines)

    return run


def test_lines_are_answered_in_turn(talk: Any) -> None:
    result = talk("--system", "Be brief.", lines="Hello\n\nAnd then?\n/stats\n/exit\nnever read\n")
    assert result.exit_code == 0, result.output
    first, second, stats = [line for line in result.stderr.splitlines() if "tokens" in line]
    assert "6 tokens (length)" in first
    assert ", 0 not read again" in first and ", 0 not read again" not in second
    assert "of 1,024 tokens in the state" in stats and "12 generated" in stats


def test_messages_of_the_command_line_give_json(talk: Any) -> None:
    result = talk("-m", "Hello", "-m", "Again", "--json")
    assert result.exit_code == 0, result.output
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [one["message"]["role"] for one in answers] == ["assistant"] * 2
    assert answers[1]["cached_tokens"] > 0
    assert answers[0]["new_tokens"] == 6


def test_a_saved_conversation_is_loaded(talk: Any, tmp_path: Path) -> None:
    file = tmp_path / "talk.state"
    result = talk(lines=f"Hello\n/save {file}\n")
    assert result.exit_code == 0, result.output
    assert f"{file}: " in result.stderr and file.is_file()
    again = talk("--load", file, "-m", "And then?", "--json")
    assert "2 messages" in again.stderr
    answer = json.loads(again.stdout)
    assert answer["cached_tokens"] > 0.5 * answer["prompt_tokens"]


def test_files_become_a_part_of_the_prompt(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("x = 1\n")
    (tmp_path / "src" / "b.bin").write_bytes(b"\xff\xfe")
    result = talk("--files", tmp_path / "src", "-m", "What is x?")
    assert result.exit_code == 0, result.output
    assert "1 files; the next message has" in result.stderr
    assert "b.bin: not UTF-8 text, left out" in result.stderr


def test_a_prompt_without_room_is_refused_and_the_talk_goes_on(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("And it came to pass. " * 400)
    result = talk(lines=f"/files {tmp_path / 'long.txt'}\nWhy?\nHello\n")
    assert result.exit_code == 0
    assert "Error: the prompt has" in result.stderr
    assert result.stderr.count("6 tokens (length)") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sav x", "unknown command /sav; did you mean '/save'?"),
        ("/save", "/save needs the name of a file"),
        ("/mode loud", "/mode takes chat, thinking or max, not 'loud'"),
        ("/load /nowhere", "/nowhere: the snapshot cannot be read"),
        ("/files /nowhere/*", "'/nowhere/*' names no file"),
        ("/files", "/files needs the name of a file"),
        ("/load ~/nowhere", f"{Path.home()}/nowhere: the snapshot cannot be read"),
    ],
)
def test_a_wrong_command_is_explained(talk: Any, line: str, message: str) -> None:
    result = talk(lines=f"{line}\n/help\n/mode thinking\n/reset\n")
    assert result.exit_code == 0, result.output
    assert message in result.stderr
    assert "/save FILE" in result.stderr


def test_patterns_name_files_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.py", "sub/a.py", "sub/c.md", ".hidden/d.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("```\n" if name == "sub/c.md" else name)
    prompt = files_prompt(["**/*.py", "sub", "b.py"])
    assert prompt.files == 3
    assert prompt.text == (
        "b.py:\n```\nb.py\n```\n\nsub/a.py:\n```\nsub/a.py\n```\n\nsub/c.md:\n````\n```\n````\n"
    )


class OnTerminal:
    """The command on a terminal of its own, where Ctrl-C is a signal."""

    def __init__(self, *arguments: Any) -> None:
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            line = [sys.executable, "-m", "v4graph.cli", *map(str, arguments)]
            os.execve(sys.executable, line, os.environ | {"TERM": "xterm"})

    def say(self, text: str, answer: str) -> None:
        """Send keys until a text has come: what is typed at the wrong moment is lost on a terminal."""
        seen = ""
        for _ in range(10):
            os.write(self.terminal, text.encode())
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline and answer not in seen:
                seen += self._read()
            if answer in seen:
                return
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(seen)

    def exit_code(self) -> int:
        self.say("/exit\n", "\0the end")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> str:
        if not select.select([self.terminal], [], [], 0.1)[0]:
            return ""
        try:
            return os.read(self.terminal, 1 << 16).decode(errors="replace")
        except OSError:  # nobody has the other end any more
            return "\0the end"


def test_ctrl_c_ends_an_answer_however_often_and_never_the_talk(long_engine: Path, checkpoint: Path) -> None:
    chat = OnTerminal("chat", long_engine, "--checkpoint", checkpoint, "--max-new-tokens", 900)
    chat.say("Hello\n", "read the prompt")
    os.write(chat.terminal, b"\x03\x03\x03\x03")
    chat.say("/stats\n", "tokens in the state")
    assert chat.exit_code() == 0


def test_ctrl_c_over_large_files_ends_the_command(talk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(patterns: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["v4graph.cli.chat"], "files_prompt", press)
    result = talk(lines="/files .\nHello\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("stopped\n6 tokens (length)")


def test_ctrl_c_stops_what_it_is_told_of_also_if_pressed_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    stopped: list[str] = []
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        ctrl_c.stops(SimpleNamespace(cancel=lambda: stopped.append("one")))
        assert stopped == ["one"]
        signal.raise_signal(signal.SIGINT)
    assert stopped == ["one", "one"]
    assert signal.getsignal(signal.SIGINT) is before
