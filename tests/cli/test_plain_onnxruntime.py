"""docs/plain_onnxruntime.py: an --embed-weights graph in a program that knows nothing of v4graph."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from v4graph_runtime import Tokenizer

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "plain_onnxruntime.py"


def test_the_script_imports_only_onnxruntime_and_numpy_in_20_lines() -> None:
    tree = ast.parse(SCRIPT.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} == {"numpy", "onnxruntime"}
    code = SCRIPT.read_text().splitlines()
    assert len([line for line in code if line]) <= 20


def test_the_page_shows_the_script() -> None:
    assert f"```python\n{SCRIPT.read_text()}```" in (ROOT / "docs" / "plain-onnxruntime.md").read_text()


def test_the_script_continues_the_prompt_as_v4graph_does(
    cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "build" / "nano.plain"
    result = cli("export", checkpoint, graph, "--embed-weights", "--max-seq-len", 1024)
    assert result.exit_code == 0, result.output
    prompt = "In the beginning"
    assert str(Tokenizer.load(checkpoint).encode(prompt)) in SCRIPT.read_text()
    # -I: no environment, no user packages, and the folder of the script is not on the path.
    done = subprocess.run(
        [sys.executable, "-I", str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    ids = json.loads(
        cli(
            *("run", engine, "--checkpoint", checkpoint, "--prompt", prompt),
            *("--max-new-tokens", 40, "--json"),
        ).stdout
    )["ids"]
    # `run` stops at the end-of-text token, the script does not.
    assert ids
    assert json.loads(done.stdout)[: len(ids)] == ids
