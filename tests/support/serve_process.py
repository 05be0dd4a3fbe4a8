"""`v4graph serve` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class ServeProcess:
    process: subprocess.Popen[str]
    url: str
    _log: IO[str]

    def log(self) -> str:
        """Return what it has written to stderr."""
        return _read(self._log)


@contextmanager
def serve_process(
    engine: Path, checkpoint: Path, *options: Any, key: str = "secret"
) -> Iterator[ServeProcess]:
    """Serve on a free port; the process is killed when the block ends."""
    command = ["serve", engine, "--checkpoint", checkpoint, "--port", 0, "--json", *options]
    # The paths of this process, so that a bare checkout works as an installation does.
    start = f"import sys; sys.path[:] = {sys.path!r}; from v4graph.cli import main; main()"
    # A file: a pipe that nobody reads is full after some hundred lines of the log, and the server waits.
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", start, *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "V4GRAPH_API_KEY": key},
        )
        assert process.stdout
        try:
            line = process.stdout.readline()
            assert line, _read(log)
            yield ServeProcess(process, json.loads(line)["url"], log)
        finally:
            process.kill()
            process.communicate()


def _read(log: IO[str]) -> str:
    log.seek(0)
    return log.read()
