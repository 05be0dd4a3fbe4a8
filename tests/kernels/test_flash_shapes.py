"""The benchmark on the emulator: every op call of Flash and Pro decode at full width is the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flash", "pro"])
def test_decode_at_full_width_gives_the_references_numbers(model: str, tmp_path: Path) -> None:
    """All widths, heads and layer kinds; 8 experts, since each is computed alike."""
    arguments = ("--emulate", "--model", model, "--workload", "decode B=1 4K", "--experts", "8")
    paths = os.pathsep.join(str(REPO / name) for name in (".", "export", "plugins", "runtime"))
    subprocess.run(
        [sys.executable, str(REPO / "benchmarks" / "kernels.py"), *arguments, "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["agrees"] for row in rows} == {"ok"}, [row for row in rows if row["agrees"] != "ok"]
    kinds = {
        "V4CsaProjections",
        "V4HcaPrep",
        "V4HyperPostPre",
        "V4CompressedAttention",
        "V4SelectedAttention",
        "V4RouteHash",
        "V4RouteTopK",
        "V4MoE",
    }
    assert kinds <= {row["op"] for row in rows}
    assert (tmp_path / "kernels.md").read_text().count("\n| ") == len(rows) + 1
