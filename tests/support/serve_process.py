"""`v4graph serve` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Serving = tuple["subprocess.Popen[str]", str]


@contextmanager
def serve_process(engine: Path, checkpoint: Path, *options: Any, key: str = "secret") -> Iterator[Serving]:
    """Serve on a free port; yield the process, which is killed at the end, and its URL."""
    command = ["serve", engine, "--checkpoint", checkpoint, "--port", 0, "--json", *options]
    # The paths of this process, so that a bare checkout works as an installation does.
    start = f"import sys; sys.path[:] = {sys.path!r}; from v4graph.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", start, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "V4GRAPH_API_KEY": key},
    )
    assert process.stdout
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)["url"]
    finally:
        process.kill()
        process.communicate()
