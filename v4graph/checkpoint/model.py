"""`Checkpoint`: a safetensors directory or file, with its configuration, opened by memory map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from v4graph.checkpoint.bind import bind, check_config, plan
from v4graph.checkpoint.check import check_tensors
from v4graph.checkpoint.reader import TensorTable, detect_format, find_files, read_slots
from v4graph.config import FILE_NAME, ModelConfig, WeightFormat
from v4graph.errors import CheckpointError
from v4graph.manifest import Binding, Manifest


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint; only headers have been read, data is mapped when asked for.

    Attributes:
        path: The directory or the one file that was opened.
        config: Its configuration.
        weights: How the matrices are stored, seen from the tensors.
        tensors: Headers, views and locations of the tensors by official name.
    """

    path: Path
    config: ModelConfig
    weights: WeightFormat
    tensors: TensorTable

    @classmethod
    def open(cls, path: str | Path, *, allow_unknown_config_keys: bool = False) -> Checkpoint:
        """Open a directory (a Hugging Face cache with its symlinks, say) or one .safetensors file.

        Official names, those of transformers and packed files are all understood; a single file
        needs config.json beside it.

        Raises:
            CheckpointError: no such directory, no config.json, a missing shard, a damaged file.
            ConfigError: config.json describes a model that v4graph does not know.
        """
        path = Path(path)
        files = find_files(path)
        config_path = (path if path.is_dir() else path.parent) / FILE_NAME
        if not config_path.is_file():
            raise CheckpointError(
                f"{config_path}: no such file; copy the model's {FILE_NAME} beside the weights."
            )
        config = ModelConfig.load(config_path, allow_unknown=allow_unknown_config_keys)
        table = TensorTable(path, read_slots(files))
        return cls(path, config, detect_format(table, config), table)

    @property
    def packed(self) -> bool:
        """Whether the experts of a layer are stacked in one tensor."""
        return self.tensors.packed

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only view of a tensor by its official name, without a copy.

        FP8, e8m0 and bf16 have their ml_dtypes types, packed FP4 is int8.

        Raises:
            CheckpointError: there is no such tensor.
        """
        return self.tensors.array(name)

    def check(self) -> None:
        """Compare all tensors with the inventory of the configuration; reads headers only.

        Raises:
            CheckpointError: tensors are missing or unexpected, or one has a wrong dtype or shape.
        """
        check_tensors(self.path, self.tensors, self.config, self.weights)

    def bind(self, binding: Binding, layer: int | None) -> npt.NDArray[Any]:
        """Return the graph input of one layer (None: model-wide), of the binding's dtype and shape.

        A view for `as-is` and `bytes`, and for `stack` on a packed checkpoint; otherwise a new array.

        Raises:
            CheckpointError: a tensor is missing, or its dtype or shape is not the graph's.
        """
        return bind(self.path, self.tensors, binding, layer)

    def check_manifest(self, manifest: Manifest) -> None:
        """Check that this checkpoint fits a graph or engine; reads headers only.

        Raises:
            CheckpointError: another model, or other tensors than the graph was exported for.
        """
        exported = ModelConfig.from_dict(manifest.config, source="manifest", allow_unknown=True)
        check_config(self.path, self.config, exported)
        for binding in manifest.bindings:
            for _, layer in binding.inputs():
                plan(self.path, self.tensors, binding, layer)

    def bound(self, manifest: Manifest) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """Check everything, then return an iterator over all weight inputs of a graph by name.

        Raises:
            CheckpointError: at once, when this checkpoint does not fit the manifest.
        """
        self.check_manifest(manifest)
        return (
            (name, self.bind(binding, layer))
            for binding in manifest.bindings
            for name, layer in binding.inputs()
        )

    def fingerprint(self, *, data: bool = False) -> str:
        """Return a SHA-256 of all names, dtypes and shapes; with `data`, of every byte as well."""
        return self.tensors.fingerprint(data)
