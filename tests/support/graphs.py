"""Nano's graphs as TensorRT takes them, and ways to break one by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from engines import NANO

from v4graph.manifest import Manifest
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph


def export_nano(folder: Path, **options: Any) -> Path:
    """Export nano to `folder`; bf16 unless said otherwise."""
    export_graph(resolve(str(NANO)), folder, ExportOptions(**{"dtype": "bfloat16", **options}))
    return folder


def change(graph: Path, folder: Path, edit: Callable[[onnx.ModelProto], None], **manifest: Any) -> Path:
    """Copy a graph directory with its model edited and manifest fields replaced; hashes are made to fit."""
    shutil.copytree(graph, folder)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    old = Manifest.load(folder)
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    dataclasses.replace(old, files={**old.files, "model.onnx": digest}, **manifest).save(folder)
    return folder


def unchanged(_model: onnx.ModelProto) -> None:
    """Edit nothing."""


def graph_input(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """Return a graph input by name."""
    return next(value for value in model.graph.input if value.name == name)
