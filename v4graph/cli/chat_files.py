"""Files and folders as a part of a prompt."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click


@dataclass(frozen=True)
class FilesPrompt:
    """The text of a prompt that holds files; `skipped` are those that are no UTF-8 text."""

    text: str
    files: int
    skipped: tuple[Path, ...]


def files_prompt(patterns: Iterable[str]) -> FilesPrompt:
    """Return the contents of all files that the patterns name, each under its path, in the order of paths.

    A pattern is a file, a folder, which stands for all below it, or has `*` and `**`. Hidden files and
    folders are left out unless they are named.

    Raises:
        click.BadParameter: a pattern that names nothing.
    """
    paths = sorted({path for pattern in patterns for path in _expand(pattern)})
    texts: list[str] = []
    skipped: list[Path] = []
    for path in paths:
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            skipped.append(path)
        except OSError as error:
            raise click.BadParameter(f"{path}: {error.strerror}.", param_hint="--files") from error
        else:
            texts.append(_block(path, text))
    return FilesPrompt("\n".join(texts), len(texts), tuple(skipped))


def _expand(pattern: str) -> Iterator[Path]:
    path = Path(pattern)
    below = f"{glob.escape(pattern)}/**/*" if path.is_dir() else pattern
    found = [Path(name) for name in glob.glob(below, recursive=True)]
    files = [path] if path.is_file() else [one for one in found if one.is_file()]
    if not files:
        raise click.BadParameter(f"'{pattern}' names no file.", param_hint="--files")
    yield from files


def _block(path: Path, text: str) -> str:
    """Return a file in a fence that is longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    end = "" if text.endswith("\n") or not text else "\n"
    return f"{path}:\n{fence}\n{text}{end}{fence}\n"
