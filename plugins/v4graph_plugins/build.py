"""Graph directory to engine directory for TensorRT."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4graph import targets as known_targets
from v4graph.errors import EngineError
from v4graph.gpu import gpus
from v4graph.manifest import Manifest, Plugin, Profile, TensorRTBuild
from v4graph.new_folder import new_folder
from v4graph.trt import Choice, TensorRT, cuda_version, load
from v4graph_plugins.catalogue import BUNDLE, plugin_hashes, plugin_versions
from v4graph_plugins.kernel_files import KernelFiles
from v4graph_plugins.lowering import Lowered, lower
from v4graph_plugins.plan import Plan, PlanBuilder, PlanOptions
from v4graph_plugins.profiles import Limits, capacity_of, profiles
from v4graph_plugins.reports import Progress

PLAN = "model.plan"
MODEL = "model.onnx"
KERNELS = "kernels"


@dataclass(frozen=True)
class BuildOptions:
    """Options of one build.

    Attributes:
        targets: Targets such as sm89, or portable; none: portable for TensorRT for RTX, else the local GPU.
        tensorrt: Which TensorRT: auto, full or rtx.
        limits: Batch, prompt piece and capacity of the profiles.
        plan: What is handed through to TensorRT.
        without_plugin: Ops that keep their function body.
        lowered: Where to also write the graph that TensorRT was given.
        bundle: Folder of the kernel bundle.
        dry_run: Check and parse only.
    """

    targets: tuple[str, ...] = ()
    tensorrt: Choice = "auto"
    limits: Limits = field(default_factory=Limits)
    plan: PlanOptions = field(default_factory=PlanOptions)
    without_plugin: tuple[str, ...] = ()
    lowered: Path | None = None
    bundle: Path = BUNDLE
    dry_run: bool = False


@dataclass(frozen=True)
class Built:
    """What was built, or would be: the engine's manifest, TensorRT and the number of plugin layers."""

    manifest: Manifest
    tensorrt: TensorRT
    plugin_layers: int
    plan_bytes: int


def choose_targets(tensorrt: TensorRT, names: Sequence[str], bundle: Path = BUNDLE) -> tuple[str, ...]:
    """Return the targets to build for.

    Raises:
        EngineError: one that this TensorRT or the kernel bundle does not have; names the alternatives.
    """
    portable = known_targets.PORTABLE
    if tensorrt.rtx:
        chosen = known_targets.parse(names) or (portable,)
        able: tuple[str, ...] = (portable, *known_targets.RTX_TARGETS)
        reason = "TensorRT for RTX does not build for it"
        other = "full TensorRT on a machine with that GPU (`--tensorrt full`)"
    else:
        local = tuple(gpu.target for gpu in gpus()[:1])
        if not local:
            raise EngineError(
                "full TensorRT builds for the GPU in the machine, and this machine has none; build there, "
                "or here for another GPU with TensorRT for RTX (`--tensorrt rtx`)."
            )
        chosen, able = known_targets.parse(names) or local, (portable, *local)
        reason = "full TensorRT builds for the GPU in the machine only"
        other = "TensorRT for RTX (`--tensorrt rtx`)"
    for target in chosen:
        if target not in able:
            why = "its builder crashes for Turing, which has no bf16 either" if target == "sm75" else reason
            raise EngineError(f"--target {target}: {why}; choose among {', '.join(able)}, or use {other}.")
    _check_bundle(chosen, bundle)
    return chosen


def _check_bundle(chosen: Sequence[str], bundle: Path) -> None:
    files = KernelFiles.load(bundle)
    for target in chosen if files is not None else ():
        if files and target != known_targets.PORTABLE and files.target_for(target) is None:
            raise EngineError(
                f"--target {target}: the kernel bundle has {', '.join(files.targets)}; choose among these, "
                "or "
                f"compile the kernels for it with `v4graph kernels build {target}`."
            )


def _kernels(bundle: Path, chosen: Sequence[str]) -> KernelFiles | None:
    """Return the kernels that an engine for these targets ships; all of them for portable."""
    files = KernelFiles.load(bundle)
    if files is None:
        return None
    if known_targets.PORTABLE in chosen:
        return files
    found = [files.target_for(target) for target in chosen]
    return files.part(dict.fromkeys(target for target in found if target))


def build_engine(
    graph_dir: str | Path, engine_dir: str | Path, options: BuildOptions, progress: Progress
) -> Built:
    """Build an engine in `engine_dir`, which must not exist or be empty; nothing is left on failure.

    Raises:
        ManifestError: `graph_dir` holds no graph.
        EngineError: the graph, an option or a target is refused, or TensorRT fails.
    """
    source, target = Path(graph_dir), Path(engine_dir)
    manifest = Manifest.load(source, kind="graph")
    _check_files(source, manifest)
    if not options.dry_run and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise EngineError(f"{target}: exists and is not empty; remove it or choose another directory.")
    progress("load TensorRT", 0, 1)
    tensorrt = load(options.tensorrt)
    chosen = choose_targets(tensorrt, options.targets, options.bundle)
    if options.plan.weight_streaming and not manifest.embedded_weights:
        raise EngineError(
            f"{source}: --weight-streaming has nothing to stream, the weights are bound at load; "
            "leave it out, or export with --embed-weights."
        )
    shapes = profiles(manifest, options.limits)
    lowered = lower(source / MODEL, manifest, chosen, options.without_plugin)
    if options.lowered is not None:
        try:
            _write(options.lowered, lowered.onnx)
        except OSError as error:
            raise EngineError(
                f"--lowered {options.lowered}: cannot be written ({error.strerror}); name a file in a folder "
                "that exists."
            ) from error
    progress("parse the graph", 0, 1)
    builder = PlanBuilder(tensorrt, lowered, source / MODEL)
    count = len(builder.plugin_layers)
    if options.dry_run:
        return Built(_record(manifest, tensorrt, chosen, shapes, lowered, None, options), tensorrt, count, 0)
    plan = builder.build(manifest, chosen, shapes, options.plan, progress)
    engine = _record(manifest, tensorrt, chosen, shapes, lowered, plan, options)
    progress("write the engine", 0, 1)
    kernels = _kernels(options.bundle, chosen) if manifest.dtype == "bfloat16" else None
    return Built(_save(target, source, engine, plan, kernels), tensorrt, count, plan.data.nbytes)


def _check_files(source: Path, manifest: Manifest) -> None:
    for name, digest in sorted(manifest.files.items()):
        path = source / name
        if not path.is_file() or _sha256(path) != digest:
            state = "was changed after it was exported" if path.is_file() else "is missing"
            raise EngineError(f"{source}: {name} {state}; export it again with `v4graph export`.")


def _record(
    graph: Manifest,
    tensorrt: TensorRT,
    targets: tuple[str, ...],
    shapes: tuple[Profile, ...],
    lowered: Lowered,
    plan: Plan | None,
    options: BuildOptions,
) -> Manifest:
    """Return the engine's manifest; the files' hashes come when they are written."""
    hashes, versions = plugin_hashes(), plugin_versions()
    record = TensorRTBuild(
        package=tensorrt.package,
        version=tensorrt.version,
        cuda=cuda_version(tensorrt.package),
        targets=targets,
        profiles=shapes,
        plugins=tuple(
            Plugin(name, versions[name], hashes[name], count) for name, count in lowered.plugins.items()
        ),
        bodies=lowered.bodies,
        layers=plan.layers if plan else 0,
        optimization_level=plan.optimization_level if plan else 0,
        weight_streaming=options.plan.weight_streaming,
    )
    return dataclasses.replace(
        graph,
        kind="engine",
        backend="trt",
        max_seq_len=capacity_of(graph, options.limits),
        tools={**graph.tools, tensorrt.package: tensorrt.version},
        passes=(*graph.passes, *lowered.passes),
        tensorrt=record,
    )


def _save(target: Path, source: Path, engine: Manifest, plan: Plan, kernels: KernelFiles | None) -> Manifest:
    with new_folder(target) as partial:
        _write(partial / PLAN, plan.data)
        for name in engine.files:
            if name != MODEL:
                shutil.copyfile(source / name, partial / name)
        if kernels is not None:
            (partial / KERNELS).mkdir()
            kernels.copy(partial / KERNELS)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        digests = {path.relative_to(partial).as_posix(): _sha256(path) for path in files}
        engine = dataclasses.replace(engine, files=digests)
        engine.save(partial)
    return engine


def _write(path: Path, data: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
