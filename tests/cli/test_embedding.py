"""docs/embed.py: the runtime in a program of 20 lines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "embed.py"


def test_the_page_shows_the_script_of_20_lines() -> None:
    code = SCRIPT.read_text()
    assert f"```python\n{code}```" in (ROOT / "docs" / "embedding.md").read_text()
    assert len([line for line in code.splitlines() if line]) <= 20


def test_the_script_answers_all_prompts(engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    for name, target in (("build/nano.engine", engine), ("models/nano", checkpoint)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    *_, last = done.stdout.splitlines()
    assert re.search(r"'[0-9]{2,4}'\]$", done.stdout, re.MULTILINE)
    cached, generated = map(int, last.split()[-2:])
    assert cached >= 3
    assert 82 <= generated <= 128
