"""Checkpoint or config to graph directory: model.onnx, manifest.json, config.json, tokenizer files.

Everything is written into a temporary directory beside the target and renamed at the end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import onnx
import onnx_ir as ir

from v4graph import __version__
from v4graph.config import ModelConfig
from v4graph.errors import ExportError
from v4graph.manifest import FloatType, Manifest, Numerics
from v4graph.new_folder import new_folder
from v4graph.ops import OPSET
from v4graph.passes import pipeline
from v4graph.passes.graph_dir import follow, op_versions
from v4graph.passes.run import name_of
from v4graph.states import model_states, round_capacity
from v4graph_export.bindings import model_bindings, unbound
from v4graph_export.compose import Progress, Recipe, compose
from v4graph_export.embed import embed_weights
from v4graph_export.flavour import Flavour, check_flavour

if TYPE_CHECKING:
    from v4graph.checkpoint import Checkpoint

MODEL_FILE = "model.onnx"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


class Source(Protocol):
    """What is exported: a checkpoint, or a config alone (then `checkpoint` is None)."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def config(self) -> ModelConfig:
        """The model."""

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The opened weights, if there are any."""

    @property
    def path(self) -> Path | None:
        """Directory with the tokenizer files, if there is one."""


@dataclass(frozen=True)
class ExportOptions:
    """Options of one export.

    Attributes:
        numerics: `exact` (nothing quantised) or `v4` (the official quantisation and rounding).
        dtype: float32 (onnxruntime CPU) or bfloat16 (TensorRT).
        max_seq_len: Capacity in tokens, rounded up to a multiple of 128 and of the ratios.
        rollback_slack: Tokens that a session may take back without replaying.
        layers: Keep only the first layers, for quick looks.
        all_logits: Output logits of every position instead of each slot's last.
        embed_weights: Write a self-contained graph with its weights beside it.
        optimize: Run the default passes.
    """

    numerics: Numerics = "v4"
    dtype: FloatType = "float32"
    max_seq_len: int = 8192
    rollback_slack: int = 8
    layers: int | None = None
    all_logits: bool = False
    embed_weights: bool = False
    optimize: bool = True


def _no_progress(_stage: str, _done: int, _total: int) -> None:
    return


def export_graph(
    source: Source, out: Path, options: ExportOptions, progress: Progress | None = None
) -> Manifest:
    """Export a model to the graph directory `out`, which must not exist or be empty.

    Raises:
        ExportError: the options do not fit the model, or `out` is in use.
        CheckpointError: the checkpoint lacks tensors that its config promises.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not empty; remove it or choose another directory.")
    config = source.config.shrink(layers=options.layers) if options.layers is not None else source.config
    weights = source.checkpoint.weights if source.checkpoint else config.weight_format
    flavour = Flavour(options.numerics, options.dtype, weights)
    _check(config, flavour, source, options)
    recipe = Recipe(config, flavour, options.rollback_slack, options.all_logits)
    passes = pipeline.DEFAULT if options.optimize else ()
    model = compose(recipe, progress or _no_progress, passes)
    manifest = follow(_manifest(recipe, options, model), model, [name_of(one) for one in passes])
    with new_folder(out) as partial:
        manifest = _write(partial, model, manifest, source)
    return manifest


def _check(config: ModelConfig, flavour: Flavour, source: Source, options: ExportOptions) -> None:
    check_flavour(config, flavour, source.name)
    if options.max_seq_len < 1:
        raise ExportError(f"max_seq_len is {options.max_seq_len}, expected at least 1 token.")
    if options.rollback_slack < 0:
        raise ExportError(f"rollback_slack is {options.rollback_slack}, expected 0 or more tokens.")
    if options.embed_weights and source.checkpoint is None:
        raise ExportError(
            f"{source.name}: --embed-weights needs weights, but this is a config alone; "
            "export a checkpoint directory."
        )
    if source.checkpoint is not None:
        source.checkpoint.check()


def _manifest(recipe: Recipe, options: ExportOptions, model: ir.Model) -> Manifest:
    config, flavour = recipe.config, recipe.flavour
    functions: dict[str, tuple[int, ...]] = {}
    for i, layer in enumerate(config.layers):
        name = f"V4Layer_{layer.kind}"
        functions[name] = (*functions.get(name, ()), i)
    return Manifest(
        kind="graph",
        backend="",
        numerics=flavour.numerics,
        dtype=flavour.dtype,
        all_logits=recipe.all_logits,
        max_seq_len=round_capacity(config, options.max_seq_len),
        rollback_slack=recipe.slack,
        opset=OPSET,
        config=dict(config.raw),
        config_sha256=config.sha256,
        layer_functions=functions,
        inputs=recipe.inputs,
        outputs=recipe.outputs,
        states=model_states(config, recipe.slack, flavour.dtype),
        bindings=model_bindings(config, flavour),
        unbound=unbound(config, flavour),
        ops=op_versions(model),
        embedded_weights=options.embed_weights,
        notes=_notes(flavour),
        tools={"v4graph": __version__}
        | {name: version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")},
        files={},
    )


def _notes(flavour: Flavour) -> tuple[str, ...]:
    if flavour.quantised and flavour.dtype == "float32":
        return ("FP8 and FP4 quantisers are exact; the official bf16 roundings between them are left out.",)
    return ()


def _write(folder: Path, model: ir.Model, manifest: Manifest, source: Source) -> Manifest:
    if manifest.embedded_weights:
        assert source.checkpoint is not None
        embed_weights(model, manifest, source.checkpoint, folder)
    proto = ir.to_proto(model)
    (folder / MODEL_FILE).write_bytes(proto.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(folder / MODEL_FILE))
    (folder / "config.json").write_text(json.dumps(manifest.config, indent=1) + "\n")
    for name in COMPANIONS:
        if source.path is not None and (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    digests = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix != ".safetensors"
    }
    manifest = dataclasses.replace(manifest, files=digests)
    manifest.save(folder)
    return manifest
