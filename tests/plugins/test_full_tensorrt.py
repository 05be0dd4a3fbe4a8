"""The builder through full TensorRT's own bindings, for which no libraries can be had here.

TensorRT for RTX has the same ABI, so the bindings of TensorRT 11 load on its libraries under other names.
That proves our calls against full TensorRT's API; what its builder would make of them needs a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, importlib, json, os, sys
from pathlib import Path
import tensorrt_rtx_libs
from v4graph import trt
from v4graph.manifest import Manifest
from v4graph_plugins.lowering import lower
from v4graph_plugins.plan import PlanBuilder, PlanOptions
from v4graph_plugins.profiles import Limits, profiles

graph, folder = map(Path, sys.argv[1:])
libraries = Path(tensorrt_rtx_libs.__file__).parent
found = sorted(libraries.glob("*.so.1"), reverse=True)
keep = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in found]
names = {
    "libnvinfer.so.11": "libtensorrt_rtx.so.1",
    "libnvonnxparser.so.11": "libtensorrt_onnxparser_rtx.so.1",
}
for name, real in names.items():
    (folder / name).write_bytes(trt._alias_library(name, real))
    keep.append(ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL))
keep.append(ctypes.CDLL(str(folder / "libnvinfer_plugin.so.11"), ctypes.RTLD_GLOBAL))
trt.name_rtx_library()
module = importlib.import_module("tensorrt_bindings")
full = trt.TensorRT(module, "tensorrt", module.__version__, "its bindings")
manifest = Manifest.load(graph)
targets = ("portable",)
builder = PlanBuilder(full, lower(graph / "model.onnx", manifest, targets, ()), graph / "model.onnx")
stages = []
options = PlanOptions(optimization_level=2, timing_cache=folder / "timing.cache")
shapes = profiles(manifest, Limits())
plan = builder.build(manifest, targets, shapes, options, lambda *step: stages.append(step))
figures = {"version": full.version, "plugins": plan.plugin_layers, "bytes": plan.data.nbytes}
print(json.dumps(figures | {"level": plan.optimization_level, "stages": len(stages)}))
"""


@pytest.fixture
def plugin_library(tmp_path: Path) -> Path:
    """Full TensorRT's library of standard plugins, of which the bindings need one symbol."""
    source = tmp_path / "plugins.cpp"
    source.write_text('extern "C" bool initLibNvInferPlugins(void*, char const*) { return true; }')
    name = "libnvinfer_plugin.so.11"
    words = ["g++", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(source)]
    subprocess.run(words, check=True)
    return tmp_path


def test_the_builder_runs_through_the_bindings_of_full_tensorrt(
    nano_graph: Path, plugin_library: Path
) -> None:
    words = [sys.executable, "-c", PROGRAM, str(nano_graph), str(plugin_library)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["version"].startswith("11.")
    assert figures["plugins"] == 73
    assert figures["level"] == 2
    assert figures["stages"]
    assert figures["bytes"] > 1_000_000
    assert (plugin_library / "timing.cache").stat().st_size
