"""Open an engine directory: what is checked whatever its backend is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph.ops import OPS_BY_NAME

MODEL = "model.onnx"
BACKENDS = ("ort", "trt")


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_engine(directory: Path) -> Manifest:
    """Load an engine's manifest and check it against this runtime; backends check their own files.

    Raises:
        ManifestError: not an engine directory, or written by another version.
        EngineError: an unknown backend, or other op versions.
    """
    manifest = Manifest.load(directory, kind="engine")
    if manifest.backend not in BACKENDS:
        raise EngineError(
            f"{directory}: built for backend '{manifest.backend}', this runtime has "
            f"{', '.join(BACKENDS)}; build it again with `v4graph build GRAPH_DIR {directory} --backend ort`."
        )
    check_ops(directory, manifest)
    return manifest


def check_dtype(directory: Path, manifest: Manifest) -> None:
    """Refuse a graph that onnxruntime's CPU provider has no kernels for."""
    if manifest.dtype != "float32":
        raise EngineError(
            f"{directory}: a {manifest.dtype} graph, for which onnxruntime has no CPU kernels; "
            "export with --dtype fp32."
        )


def check_ops(directory: Path, manifest: Manifest) -> None:
    """Refuse ops of other versions: their definition, and so the numbers, may have changed."""
    for name, version in manifest.ops.items():
        spec = OPS_BY_NAME.get(name.partition("__")[0])
        if spec is None or spec.version != version:
            known = f"version {spec.version}" if spec else "no such op"
            raise EngineError(
                f"{directory}: made with op {name} version {version}, this v4graph has {known}; export again "
                f"with `v4graph export` and build again with {_build_command(directory, manifest)}."
            )


def _build_command(directory: Path, manifest: Manifest) -> str:
    if manifest.tensorrt is None:
        return "`v4graph build`"
    targets = "".join(f" --target {target}" for target in manifest.tensorrt.targets)
    return f"`v4graph build GRAPH_DIR {directory} --backend trt{targets}`"


def check_file(directory: Path, manifest: Manifest, name: str, remedy: str) -> None:
    """Refuse a file that is missing or is not the one the manifest recorded."""
    path = directory / name
    if not path.is_file():
        raise EngineError(f"{directory}: {name} is missing; {remedy}.")
    expected = manifest.files.get(name)
    if expected is None:
        raise EngineError(f"{directory}: the manifest records no {name}; {remedy}.")
    if sha256(path) != expected:
        raise EngineError(f"{directory}: {name} was changed after it was built (sha256 differs); {remedy}.")
