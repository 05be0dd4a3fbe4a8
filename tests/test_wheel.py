"""The tag of a wheel says whether compiled kernels are in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
LIBRARY = "v4graph_runtime/native/lib/libv4graph_cpu.so"
# Enough to be a distribution: the four packages' files play no part in the tag.
_BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"


@pytest.mark.skipif(sys.platform != "linux", reason="the library is built for Linux")
@pytest.mark.parametrize("compiled", [True, False])
def test_a_wheel_is_of_one_platform_only_with_the_library_in_it(tmp_path: Path, compiled: bool) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path)
    for folder in ("v4graph", "runtime/v4graph_runtime"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(REPO / folder / "__init__.py", tmp_path / folder)
    for folder in ("export", "plugins"):
        (tmp_path / folder).mkdir()
    if compiled:
        library = tmp_path / "runtime" / LIBRARY
        library.parent.mkdir(parents=True)
        library.write_bytes(b"\x7fELF")
    done = subprocess.run(
        [sys.executable, "-c", _BUILD], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    assert done.stdout.splitlines()[-1] == wheel.name
    assert wheel.name.endswith("-py3-none-any.whl") != compiled
    assert ("-py3-none-linux_" in wheel.name) == compiled
    assert (LIBRARY in zipfile.ZipFile(wheel).namelist()) == compiled
