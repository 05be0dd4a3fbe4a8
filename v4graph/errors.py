"""Typed errors; each message is one sentence: what, where, expected and got, how to fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class V4GraphError(Exception):
    """Base of every error that a user can cause; the command line prints it and exits with 2.

    `detail` is what another program said about it (TensorRT's own messages); it goes below the sentence.
    """

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message}\n{self.detail}" if self.detail else message


class ConfigError(V4GraphError):
    """config.json is missing, malformed, or describes a model that v4graph does not know."""


class CheckpointError(V4GraphError):
    """A checkpoint's files or tensors are missing, truncated, or not what its config promises."""


class ManifestError(V4GraphError):
    """A graph or engine directory does not hold what its manifest says, or is of another version."""


class ExportError(V4GraphError):
    """A model cannot be lowered with the requested numerics, dtype or options."""


class PassError(V4GraphError):
    """A graph pass is unknown, fails, or changes the numbers."""


class EngineError(V4GraphError):
    """An engine cannot be built or opened on this machine."""


class SessionError(V4GraphError):
    """A session was asked for something that its engine or its state cannot do."""


class BusyError(SessionError):
    """An engine loop has as much waiting as it takes, or is closing; the same call may succeed later."""


class ChatError(V4GraphError):
    """A conversation cannot be encoded: a message, tool or mode is not what the format knows."""


def near_match(name: str, known: Iterable[str], most: int = 1) -> str:
    """Return `"; did you mean 'x' or 'y'?"` with the nearest known names, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=most, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, matches))}?" if matches else ""
