"""manifest.json of graph and engine directories: the whole contract between exporter and runtime.

Patterns keep it small: `{i}` is a layer index, `{e}` an expert index. A state or binding names the
layers that it stands for, so the manifest does not grow with depth or with the number of experts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from v4graph.errors import ManifestError

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1

Layout = Literal["as-is", "bytes", "cast", "dequantise", "stack"]
Numerics = Literal["exact", "v4"]
FloatType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TensorContract:
    """One graph input or output: `shape` holds ints and the symbols B, S, C4, C128, ..."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class State:
    """A state tensor of several layers: graph input `name`, next value `output`, both patterns.

    `shape` is [B, rows, width]; `rows` is an int for rings ("ring": row = position mod rows) or
    "capacity//r" for append-only caches ("append": row b holds the entry of block b).
    """

    name: str
    output: str
    layers: tuple[int, ...]
    dtype: str
    shape: tuple[int | str, ...]
    rule: Literal["ring", "append"]
    ratio: int

    def rows(self, capacity: int) -> int:
        """Return the number of rows at a capacity given in tokens."""
        rows = self.shape[1]
        return rows if isinstance(rows, int) else capacity // self.ratio


@dataclass(frozen=True)
class Binding:
    """Weight inputs `input` made from checkpoint tensors `tensor` (official names) by `layout`.

    `layout` steps are applied in order: `bytes` views FP8 or e8m0 as int8, `dequantise` multiplies
    by the tensor `scale`, `cast` converts to `dtype`, `stack` joins the experts along a new first
    axis, `as-is` does nothing. `shape` and `dtype` are those of the graph input.
    """

    input: str
    tensor: str
    layers: tuple[int, ...]
    experts: int
    dtype: str
    shape: tuple[int, ...]
    layout: tuple[Layout, ...]
    stored_dtype: str
    scale: str = ""

    def inputs(self) -> Iterator[tuple[str, int | None]]:
        """Yield each graph input with its layer index (None for model-wide tensors)."""
        if not self.layers:
            yield self.input, None
        for layer in self.layers:
            yield self.input.replace("{i}", str(layer)), layer

    def tensors(self, layer: int | None) -> list[str]:
        """Return the checkpoint tensors of one input, weights only, in stacking order."""
        name = self.tensor if layer is None else self.tensor.replace("{i}", str(layer))
        return [name.replace("{e}", str(e)) for e in range(self.experts)] if self.experts else [name]

    def scales(self, layer: int | None) -> list[str]:
        """Return the scale tensors that `dequantise` reads, in the order of `tensors`."""
        if not self.scale:
            return []
        name = self.scale if layer is None else self.scale.replace("{i}", str(layer))
        return [name.replace("{e}", str(e)) for e in range(self.experts)] if self.experts else [name]


@dataclass(frozen=True)
class Unbound:
    """Checkpoint tensors that no graph input reads yet, by pattern, with their number."""

    pattern: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Profile:
    """One TensorRT optimization profile: (least, usual, most) of what a call may bring.

    `batch` and `tokens` are B and S; `capacity` is in tokens, of which a cache has capacity // ratio rows.
    """

    name: str
    batch: tuple[int, int, int]
    tokens: tuple[int, int, int]
    capacity: tuple[int, int, int]


@dataclass(frozen=True)
class Plugin:
    """One custom op that runs as a plugin: `sha256` is of its contract and kernels, `layers` counts uses."""

    op: str
    version: int
    sha256: str
    layers: int


@dataclass(frozen=True)
class TensorRTBuild:
    """How a TensorRT plan was made, and so what it needs to run.

    `package` is tensorrt or tensorrt_rtx; `cuda` the CUDA version that it was built for; `targets` are
    names such as sm89, or portable. `bodies` are the custom ops that run as native layers instead.
    """

    package: str
    version: str
    cuda: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    plugins: tuple[Plugin, ...]
    bodies: tuple[str, ...]
    layers: int
    optimization_level: int
    weight_streaming: bool


@dataclass(frozen=True)
class Manifest:
    """What a graph directory ("graph") or an engine directory ("engine") promises.

    `config` is config.json as read, in the hub form or the transformers form; `layer_functions`
    maps ONNX function names to the layers that call them; `tools` maps package names to versions;
    `passes` are the graph passes that ran, in order; `tensorrt` is there in TensorRT engines only.
    """

    kind: Literal["graph", "engine"]
    backend: str
    numerics: Numerics
    dtype: FloatType
    all_logits: bool
    max_seq_len: int
    rollback_slack: int
    opset: int
    config: dict[str, Any]
    config_sha256: str
    layer_functions: dict[str, tuple[int, ...]]
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    states: tuple[State, ...]
    bindings: tuple[Binding, ...]
    unbound: tuple[Unbound, ...]
    ops: dict[str, int]
    embedded_weights: bool
    notes: tuple[str, ...]
    tools: dict[str, str]
    files: dict[str, str]
    passes: tuple[str, ...] = ()
    tensorrt: TensorRTBuild | None = None
    format_version: int = FORMAT_VERSION

    def save(self, directory: Path) -> None:
        """Write manifest.json under a temporary name, then rename it."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        partial = directory / (FILE_NAME + ".partial")
        partial.write_text(text)
        os.replace(partial, directory / FILE_NAME)

    @classmethod
    def load(cls, directory: Path, kind: Literal["graph", "engine"] | None = None) -> Manifest:
        """Read a manifest and check its kind and format version.

        Raises:
            ManifestError: not a v4graph directory, another kind, or written by another version.
        """
        path = directory / FILE_NAME
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ManifestError(
                f"{directory}: no {FILE_NAME} here, so this is not a graph or engine directory; "
                "write one with `v4graph export` or `v4graph build`."
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ManifestError(f"{path}: not valid JSON ({error}); export or build it again.") from error
        if not isinstance(raw, dict) or raw.get("format_version") != FORMAT_VERSION:
            got = raw.get("format_version") if isinstance(raw, dict) else None
            raise ManifestError(
                f"{path}: format_version is {got}, this v4graph reads {FORMAT_VERSION}; "
                "export and build again with this version."
            )
        if kind is not None and raw["kind"] != kind:
            command = "v4graph build" if kind == "engine" else "v4graph export"
            raise ManifestError(
                f"{directory}: holds a {raw['kind']}, expected an {kind}; make one with `{command}`."
            )
        return _from_json(raw, path)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _record(cls: type[Any], raw: dict[str, Any]) -> Any:
    return cls(**{key: _tuples(value) for key, value in raw.items()})


def _from_json(raw: dict[str, Any], path: Path) -> Manifest:
    nested = {"inputs": TensorContract, "outputs": TensorContract, "states": State, "bindings": Binding}
    nested["unbound"] = Unbound
    try:
        fields: dict[str, Any] = {}
        for key, value in raw.items():
            if key in nested:
                fields[key] = tuple(_record(nested[key], item) for item in value)
            elif key == "config":
                fields[key] = value
            elif key == "tensorrt" and value is not None:
                nested_build = {"profiles": Profile, "plugins": Plugin}
                parts = {k: tuple(_record(c, item) for item in value[k]) for k, c in nested_build.items()}
                fields[key] = _record(TensorRTBuild, value | parts)
            elif key == "layer_functions":
                fields[key] = {name: tuple(layers) for name, layers in value.items()}
            else:
                fields[key] = _tuples(value)
        return Manifest(**fields)
    except (TypeError, KeyError) as error:
        raise ManifestError(f"{path}: a field is missing or unknown ({error}); export it again.") from error
