"""`v4graph serve` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

Serving = tuple["subprocess.Popen[str]", str]


@contextmanager
def serve_process(engine: Path, checkpoint: Path, *options: Any, key: str = "secret") -> Iterator[Serving]:
    """Serve on a free port; yield the process, which is killed at the end, and its URL."""
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
            yield process, json.loads(line)["url"]
        finally:
            process.kill()
            process.communicate()


def _read(log: IO[str]) -> str:
    log.seek(0)
    return log.read()
