"""`v4graph encode`: a file of chat messages to the prompt that the model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from v4graph.cli.output import extra, json_option, print_json
from v4graph.errors import ChatError

if TYPE_CHECKING:
    from v4graph_runtime.chat import Mode


@click.command()
@click.argument("messages", metavar="MESSAGES.json", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--mode",
    type=click.Choice(["chat", "thinking", "max"]),
    default="chat",
    show_default=True,
    help="Answer at once, think before, or think at length.",
)
@click.option("--keep-thinking", is_flag=True, help="Keep what was reasoned before the last user message.")
@click.option("--tokens", is_flag=True, help="Print token ids instead of text; needs --tokenizer.")
@click.option(
    "--tokenizer",
    "tokenizer_dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where tokenizer.json is: a checkpoint or an engine.",
)
@json_option
def encode(
    messages: Path,
    mode: Mode,
    keep_thinking: bool,
    tokens: bool,
    tokenizer_dir: Path | None,
    as_json: bool,
) -> None:
    """Print the prompt of a conversation.

    MESSAGES.json holds a list of messages with role and content, or an object with messages and tools;
    - reads standard input. The prompt is in DeepSeek-V4's official format.

    \b
    v4graph encode messages.json --mode thinking
    v4graph encode messages.json --tokens --tokenizer models/nano
    """
    if tokens and tokenizer_dir is None:
        raise click.UsageError("--tokens needs the tokenizer: name its directory with --tokenizer DIR.")
    with extra("ort"):
        from v4graph_runtime import Tokenizer, chat
    prompt = chat.encode(_read(messages), mode, drop_thinking=not keep_thinking)
    result: dict[str, Any] = {"mode": mode, "prompt": prompt, "characters": len(prompt)}
    if tokenizer_dir:
        tokenizer = Tokenizer.load(tokenizer_dir)
        ids = tokenizer.encode(prompt)
        result |= {"tokens": len(ids), "ids": ids, "missing_tokens": chat.missing_tokens(prompt, tokenizer)}
    if as_json:
        print_json(result)
        return
    click.echo(" ".join(map(str, result["ids"])) if tokens else prompt)
    if tokenizer_dir:
        click.echo(f"{result['tokens']} tokens, {len(prompt)} characters", err=True)
        if missing := result["missing_tokens"]:
            click.echo(f"no model for chat: its tokenizer has no token for {', '.join(missing)}", err=True)


def _read(path: Path) -> Any:
    name = "standard input" if str(path) == "-" else path
    try:
        with click.open_file(str(path), encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise ChatError(f"{name}: {error.strerror}; name a file of messages.") from error
    except (ValueError, RecursionError) as error:
        raise ChatError(f"{name}: not JSON ({error}).") from error
