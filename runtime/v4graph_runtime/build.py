"""Graph directory to engine directory for onnxruntime.

The graph itself is kept as it is: what is added is the proof that this onnxruntime loads it, and
the versions and hashes that `Session` checks.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph.new_folder import new_folder
from v4graph.ort import load
from v4graph_runtime.engine import MODEL, check_dtype, check_file, check_ops, sha256
from v4graph_runtime.ort_backend import OrtOptions, open_model

EMBEDDED_WEIGHTS = ".safetensors"


def build_engine(
    graph_dir: str | Path, engine_dir: str | Path, *, options: OrtOptions | None = None
) -> Manifest:
    """Build an engine for onnxruntime in `engine_dir`, which must not exist or be empty.

    `options` say how the graph is loaded to prove that it can be, on the CPU by default; the engine is the
    same for every provider. Embedded weights are copied: onnx refuses external data with several hard
    links. Nothing is left behind on failure.

    Raises:
        ManifestError: `graph_dir` holds no graph.
        EngineError: `engine_dir` is in use, a file of the graph is missing or changed, or onnxruntime
            cannot load the graph or run on the provider.
    """
    options = options or OrtOptions()
    source, target = Path(graph_dir), Path(engine_dir)
    manifest = Manifest.load(source, kind="graph")
    if options.provider == "cpu":
        check_dtype(source, manifest)
    check_ops(source, manifest)
    for name in sorted({MODEL, *manifest.files}):
        check_file(source, manifest, name, "export it again with `v4graph export`")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise EngineError(f"{target}: exists and is not empty; remove it or choose another directory.")
    with new_folder(target) as partial:
        engine = _write(partial, source, manifest, options)
    return engine


def _write(folder: Path, source: Path, manifest: Manifest, options: OrtOptions) -> Manifest:
    for name in manifest.files:
        shutil.copyfile(source / name, folder / name)
    for path in source.glob("*" + EMBEDDED_WEIGHTS):
        shutil.copyfile(path, folder / path.name)
    open_model(folder / MODEL, options)
    engine = dataclasses.replace(
        manifest,
        kind="engine",
        backend="ort",
        tools={**manifest.tools, "onnxruntime": load().__version__},
        files={name: sha256(folder / name) for name in sorted(manifest.files)},
    )
    engine.save(folder)
    return engine
