"""`v4graph chat`: a conversation in the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.chat_files import FilesPrompt, files_prompt
from v4graph.cli.ctrl_c import CtrlC
from v4graph.cli.engine import checkpoint_option, open_engine, provider_option, threads_option
from v4graph.cli.output import allow_unknown_option, extra, json_option, progress, size
from v4graph.cli.sampling import generate_options, sampling_options
from v4graph.errors import V4GraphError, near_match

if TYPE_CHECKING:
    from v4graph.ort import Provider
    from v4graph_runtime.chat import Mode
    from v4graph_runtime.serving.dialogue import Dialogue, Reply

COMMANDS = {
    "/files PATTERN ...": "put files, folders or patterns into the next message",
    "/save FILE": "keep the conversation and its state in a file",
    "/load FILE": "go on from such a file at once, without reading the conversation again",
    "/mode chat|thinking|max": "answer at once, think before, or think at length",
    "/reset": "forget the conversation; a system message stays",
    "/stats": "tokens in the state, its bytes, what was reused",
    "/help": "these lines",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


@click.command(
    epilog="Commands in the chat: " + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()) + "."
)
@click.argument("engine_dir", type=click.Path(path_type=Path))
@checkpoint_option
@click.option(
    "--mode",
    type=click.Choice(["chat", "thinking", "max"]),
    default="chat",
    show_default=True,
    help="Answer at once, think before, or think at length.",
)
@click.option("--system", help="What the model is told before the conversation.")
@click.option(
    "--files",
    multiple=True,
    metavar="PATTERN",
    help="Files, folders or patterns that the first message holds; may be given several times, and a "
    "pattern in quotes, as 'src/**/*.py', is expanded here.",
)
@click.option("--load", type=click.Path(path_type=Path), help="Go on from a file of /save.")
@click.option("--message", "-m", multiple=True, help="Say this and end, instead of asking; may be repeated.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True)
@sampling_options
@provider_option
@threads_option
@allow_unknown_option
@json_option
def chat(
    engine_dir: Path,
    checkpoint: str | None,
    mode: Mode,
    system: str | None,
    files: tuple[str, ...],
    load: Path | None,
    message: tuple[str, ...],
    provider: Provider,
    threads: int,
    allow_unknown: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Talk with a model.

    Answers go to stdout; reasoning, figures and progress to stderr. Lines are read from stdin, so a file of
    them works too. With --json each answer is an object on a line of its own.

    \b
    v4graph chat build/flash.engine --checkpoint DIR --mode thinking
    v4graph chat build/flash.engine --checkpoint DIR --files 'src/**/*.py' -m "Where is the bug?"
    """
    first = files_prompt(files) if files else None
    with extra("serve"):
        from v4graph_runtime import PrefixCache
        from v4graph_runtime.serving import Engine
        from v4graph_runtime.serving.dialogue import Dialogue
    options = generate_options(sampling).request()
    session, tokenizer = open_engine(engine_dir, checkpoint, provider, threads, allow_unknown)
    with session, Engine(session, tokenizer, cache=PrefixCache()) as engine:
        told = [{"role": "system", "content": system}] if system else []
        terminal = Terminal(Dialogue(engine, options, mode, told), as_json)
        if first:
            terminal.attach(first)
        if load:
            terminal.load(str(load))
        if message:
            for text in message:
                terminal.say(text)
        else:
            terminal.talk()


@dataclass
class Terminal:
    """A dialogue on stdin, stdout and stderr."""

    dialogue: Dialogue
    as_json: bool = False
    attached: str = ""

    def talk(self) -> None:
        """Read lines until there are no more; a refused one is reported and the talk goes on."""
        if sys.stdin.isatty():
            with suppress(ImportError):
                import readline  # noqa: F401  (lines can be edited, and arrow up brings the last one)
            click.echo("/help lists the commands.", err=True)
        for line in _lines():
            try:
                if line.startswith("/"):
                    if self._command(*line.split(maxsplit=1)):
                        return
                elif line.strip():
                    self.say(line)
            except (V4GraphError, click.UsageError) as error:
                click.echo(
                    f"Error: {error.message if isinstance(error, click.UsageError) else error}", err=True
                )
            except KeyboardInterrupt:  # over large files, say
                click.echo("stopped", err=True)

    def say(self, text: str) -> None:
        """Say something, with the files that wait to be said, and print the answer."""
        # Files that do not fit are not in the way of the next message.
        text, self.attached = self.attached + text, ""
        # What was made of a stopped answer stays in the conversation.
        with CtrlC() as ctrl_c:
            reply = self.dialogue.say(text)
            ctrl_c.stops(reply)
            self._wait(reply)
            if self.as_json:
                reply.message_at_end()
            else:
                self._show(reply)
        if self.as_json:
            click.echo(json.dumps(_figures(reply), ensure_ascii=False))
            return
        click.echo()
        click.echo(_summary(reply), err=True)

    def attach(self, prompt: FilesPrompt) -> None:
        """Put files before the next message, and say how many tokens that takes."""
        for path in prompt.skipped:
            click.echo(f"{path}: not UTF-8 text, left out", err=True)
        self.attached += prompt.text + "\n"
        tokens, capacity = len(self.dialogue.prompt(self.attached)), self.dialogue.engine.session.capacity
        click.echo(
            f"{prompt.files} files; the next message has {tokens:,} tokens of the {capacity:,} that the "
            "engine holds",
            err=True,
        )

    def load(self, path: str) -> None:
        """Go on from a saved conversation."""
        with CtrlC():  # half a state would be none
            self.dialogue.load(Path(path))
        count = len(self.dialogue.messages)
        click.echo(f"{path}: {count} messages, {self._position():,} tokens in the state", err=True)

    def _show(self, reply: Reply) -> None:
        kind = ""
        for delta in reply:
            if kind == "reasoning" and delta.kind != "reasoning":
                click.echo("\n", err=True)
            kind = delta.kind
            if kind == "reasoning":
                click.secho(delta.text, nl=False, err=True, dim=True)
            else:
                click.echo(f"\n[{delta.text}] " if kind == "call" else delta.text, nl=False)

    def _wait(self, reply: Reply) -> None:
        """Show how far the prompt has been read, until the first token is there."""
        total, generation = reply.generation.prompt_tokens, reply.generation
        with progress() as report:
            while not (generation.time_to_first_token or generation.finish):
                report("read the prompt", self.dialogue.engine.stats().held_tokens, total)
                time.sleep(0.02)

    def _command(self, name: str, argument: str = "") -> bool:
        """Do what a line with a slash says; return whether it ends the talk."""
        known: dict[str, Callable[[], None]] = {
            "/files": lambda: self.attach(files_prompt(_needed(name, argument).split())),
            "/save": lambda: self._save(_needed(name, argument)),
            "/load": lambda: self.load(_needed(name, argument)),
            "/mode": lambda: self._mode(argument),
            "/reset": self.dialogue.forget,
            "/stats": self._stats,
            "/help": lambda: click.echo(
                "\n".join(f"{n:24} {what}" for n, what in COMMANDS.items()), err=True
            ),
            "/exit": lambda: None,
        }
        if name not in known:
            near = near_match(name, known) or "; /help lists them."
            raise click.UsageError(f"unknown command {name}{near}")
        known[name]()
        return name == "/exit"

    def _save(self, path: str) -> None:
        count = self.dialogue.save(Path(path))
        click.echo(f"{path}: {size(count)}, {self._position():,} tokens", err=True)

    def _mode(self, mode: str) -> None:
        if mode not in ("chat", "thinking", "max"):
            raise click.UsageError(f"/mode takes chat, thinking or max, not '{mode}'.")
        self.dialogue.mode = mode  # type: ignore[assignment]

    def _stats(self) -> None:
        stats = self.dialogue.engine.stats()
        click.echo(
            f"{self._position():,} of {stats.capacity:,} tokens in the state ({size(stats.state_bytes)}); "
            f"{stats.prompt_tokens:,} prompt tokens so far, {stats.cached_tokens:,} of them not read again; "
            f"{stats.generated_tokens:,} generated",
            err=True,
        )

    def _position(self) -> int:
        return int(self.dialogue.engine.session.position[0])


def _lines() -> Iterator[str]:
    """Yield lines of stdin; Ctrl-C drops the line that was begun."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo("", err=True)


def _needed(command: str, argument: str) -> str:
    """Return a command's files; there is no shell that would know of ~."""
    if not argument:
        raise click.UsageError(f"{command} needs the name of a file.")
    return " ".join(os.path.expanduser(part) for part in argument.split(" "))


def _figures(reply: Reply) -> dict[str, Any]:
    made = reply.generation
    names = ("finish", "prompt_tokens", "cached_tokens", "new_tokens", "time_to_first_token", "seconds")
    return {"message": reply.message.to_dict()} | {name: getattr(made, name) for name in names}


def _summary(reply: Reply) -> str:
    made, message = reply.generation, reply.message
    first, rest = made.time_to_first_token, made.seconds - made.time_to_first_token
    speed = f", {(made.new_tokens - 1) / rest:.1f} tokens/s" if made.new_tokens > 1 and rest else ""
    problems = f"; {message.problems[0]}" if message.problems else ""
    return (
        f"{made.new_tokens} tokens ({made.finish}){speed}; "
        f"{f'first token after {first * 1000:.0f} ms' if first else 'no token yet'} "
        f"({made.prompt_tokens:,} in the prompt, {made.cached_tokens:,} not read again){problems}"
    )
