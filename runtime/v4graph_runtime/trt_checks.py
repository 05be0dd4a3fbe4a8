"""Whether this machine runs a TensorRT engine: plugins, GPU, driver, TensorRT; the GPU is not touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from v4graph import gpu, trt
from v4graph.errors import EngineError, SessionError
from v4graph.gpu import Gpu
from v4graph.manifest import Manifest, TensorRTBuild
from v4graph.ops import OPS_BY_NAME
from v4graph.ort import driver_too_old, no_gpu
from v4graph.targets import PORTABLE, RTX_TARGETS, runs_on
from v4graph.trt import TITLES, Choice, TensorRT, version_tuple
from v4graph_runtime.device import CudaDevice, Device
from v4graph_runtime.engine import check_file
from v4graph_runtime.plugin_host import PluginHost, find_host
from v4graph_runtime.trt_engine import PLAN

# Folder of the kernels that an engine ships.
KERNELS = "kernels"
RTX = trt.PACKAGES["rtx"]
CHOICES: dict[str, Choice] = {trt.PACKAGES["full"]: "full", RTX: "rtx"}


@dataclass(frozen=True)
class Machine:
    """What a machine has to run engines with."""

    gpus: tuple[Gpu, ...]
    driver: tuple[int, int] | None
    host: PluginHost | None
    load: Callable[[Choice], TensorRT]
    open_device: Callable[[int], Device]


def this_machine() -> Machine:
    """Return this machine; TensorRT and the GPU are not loaded before they are used.

    Raises:
        EngineError: the plugins are installed but do not load.
    """
    return Machine(gpu.gpus(), gpu.driver_version(), find_host(), trt.load, CudaDevice)


def record_of(directory: Path, manifest: Manifest) -> TensorRTBuild:
    """Return how the plan was built.

    Raises:
        EngineError: the manifest does not say.
    """
    if manifest.tensorrt is None:
        raise EngineError(
            f"{directory}: the manifest does not say how {PLAN} was built; build it again with "
            f"`v4graph build GRAPH_DIR {directory} --backend trt`."
        )
    return manifest.tensorrt


def rebuild(directory: Path, record: TensorRTBuild, targets: tuple[str, ...] = ()) -> str:
    """Return the clause with the command that builds an engine again, for its own targets or others."""
    options = "".join(f" --target {target}" for target in targets or record.targets)
    kind = f" --tensorrt {CHOICES[record.package]}" if record.package in CHOICES else ""
    return f"build it again with `v4graph build GRAPH_DIR {directory} --backend trt{options}{kind}`"


def check_files(directory: Path, manifest: Manifest) -> None:
    """Refuse files and a configuration that are not those that the engine was built with.

    Raises:
        EngineError: names the file or the manifest's config.
    """
    remedy = rebuild(directory, record_of(directory, manifest))
    for name in sorted({PLAN, *manifest.files}):
        check_file(directory, manifest, name, remedy)
    # The rule of ModelConfig.sha256, which would refuse keys that were accepted at export.
    text = json.dumps(manifest.config, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != manifest.config_sha256:
        raise EngineError(
            f"{directory}: the config in manifest.json was changed after it was built (sha256 differs); "
            f"{remedy}."
        )


def check_plugins(directory: Path, record: TensorRTBuild, host: PluginHost | None) -> None:
    """Refuse plugins that are missing or are not those that the plan was built with.

    Raises:
        EngineError: names the op.
    """
    for name in record.bodies:
        spec = OPS_BY_NAME.get(name.partition("__")[0])
        if spec is not None and any(port.alias for port in spec.outputs):
            raise EngineError(
                f"{directory}: built with --no-plugin {name}, whose body does not update its state in place, "
                f"as a session needs; {rebuild(directory, record)}, without that option."
            )
    if not record.plugins:
        return
    if host is None:
        raise EngineError(
            f"{directory}: has {len(record.plugins)} ops as plugins, and no plugins are installed here "
            "(entry point v4graph.plugins); install v4graph again with `pip install 'v4graph[rtx]'`."
        )
    hashes = host.hashes()
    for plugin in record.plugins:
        found = hashes.get(plugin.op)
        if found is None:
            raise EngineError(
                f"{directory}: built with a plugin for {plugin.op}, which the installed plugins do not have; "
                f"{rebuild(directory, record)}."
            )
        if found != plugin.sha256:
            raise EngineError(
                f"{directory}: built with plugin {plugin.op} {plugin.sha256[:12]}, the installed one is "
                f"{found[:12]} (its contract or launch plan changed); {rebuild(directory, record)}."
            )


def check_gpu(directory: Path, record: TensorRTBuild, machine: Machine, index: int) -> None:
    """Refuse a machine without a GPU that the plan runs on.

    Raises:
        EngineError: no GPU, a driver that is too old, or another architecture.
        SessionError: no GPU of this index.
    """
    if not machine.gpus or machine.driver is None:
        raise EngineError(
            f"{directory}: {no_gpu()}; this machine can build engines but not run them, so run the model "
            "with one built with --backend ort meanwhile."
        )
    if not 0 <= index < len(machine.gpus):
        raise SessionError(
            f"GPU {index} does not exist, this process sees {len(machine.gpus)}; choose 0 to "
            f"{len(machine.gpus) - 1}."
        )
    cuda = version_tuple(record.cuda)
    if cuda and machine.driver < (cuda[0], 0):
        title = f"{TITLES.get(record.package, record.package)} {record.version}"
        raise EngineError(f"{directory}: {driver_too_old(title, cuda[0], machine.driver)}.")
    here = machine.gpus[index]
    if not runs_on(record.targets, here.target, rtx=record.package == RTX):
        raise EngineError(
            f"{directory}: built for {', '.join(record.targets)}, GPU {index} is {here.target} "
            f"({here.name}); {_rebuild_for(directory, record, here.target)}."
        )


def _rebuild_for(directory: Path, record: TensorRTBuild, target: str) -> str:
    if record.package != RTX or target in RTX_TARGETS:
        return rebuild(directory, record, (target,))
    if runs_on((PORTABLE,), target, rtx=True):
        return rebuild(directory, record, (PORTABLE,))
    return rebuild(directory, dataclasses.replace(record, package="tensorrt"), (target,))


def kernels_of(directory: Path) -> Path | None:
    """Return the folder of the kernels that an engine ships, None if it ships none."""
    folder = directory / KERNELS
    return folder if folder.is_dir() else None


def check_kernels(directory: Path, manifest: Manifest, machine: Machine, index: int) -> None:
    """Refuse plugins that cannot run on the GPU.

    Raises:
        EngineError: neither the engine nor the installation has a way to run them.
    """
    if machine.host is None or manifest.tensorrt is None or not manifest.tensorrt.plugins:
        return
    problem = machine.host.problem(manifest.dtype, machine.gpus[index].target, kernels_of(directory))
    if problem is not None:
        raise EngineError(f"{directory}: {problem}.")


def load_tensorrt(
    directory: Path, record: TensorRTBuild, machine: Machine, choice: Choice = "auto"
) -> TensorRT:
    """Load the TensorRT that the plan needs: the package and the version that built it.

    Raises:
        EngineError: another is asked for or installed, or none.
    """
    needed = CHOICES.get(record.package)
    built = f"{TITLES.get(record.package, record.package)} {record.version}"
    if needed is None or choice not in ("auto", needed):
        raise EngineError(
            f"{directory}: built with {built}, '{choice}' is asked for; a plan runs on the TensorRT that "
            "built it only, so leave the choice out."
        )
    try:
        tensorrt = machine.load(needed)
    except EngineError as error:
        raise EngineError(f"{directory}: built with {built}: {error}") from error
    # NVIDIA promises nothing for a plan on another version without VERSION_COMPATIBLE, which RTX lacks.
    if version_tuple(tensorrt.version)[:3] != version_tuple(record.version)[:3]:
        pinned = ".".join(map(str, version_tuple(record.version)[:3])) + ".*"
        packages = "tensorrt" if needed == "full" else "tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
        pins = " ".join(f"'{name}=={pinned}'" for name in packages.split())
        raise EngineError(
            f"{directory}: built with {built}, {tensorrt.version} is installed, and a plan runs on the "
            f"version that built it only; {rebuild(directory, record)}, or `pip install {pins}`."
        )
    return tensorrt


def check_batch(record: TensorRTBuild, batch: int) -> None:
    """Refuse a batch outside the profiles.

    Raises:
        SessionError: names the profile and the option that sets its limit.
    """
    for profile in record.profiles:
        least, _, most = profile.batch
        if not least <= batch <= most:
            raise SessionError(
                f"batch is {batch}, profile '{profile.name}' of the engine takes {least} to {most}; build it "
                f"again with `v4graph build --backend trt --max-batch-size {batch}`, or open fewer slots."
            )
