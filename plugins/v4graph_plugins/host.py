"""`Host`: this installation's plugins, as the runtime and the builder find them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError
from v4graph.trt import installed
from v4graph_plugins.catalogue import BUNDLE, PLUGIN_OPS, plugin_hashes
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.kernel_files import KernelFiles
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.plugin import Findings, plugin_classes
from v4graph_plugins.reference_launcher import ReferenceLauncher

# TensorRT's registry is one per process and does not keep Python creators alive; neither may go.
_FINDINGS = Findings()
_CREATORS: dict[str, list[Any]] = {}


class Host:
    """The plugins of this installation; `bundle` is the folder of its kernels."""

    def __init__(self, bundle: Path = BUNDLE) -> None:
        self._bundle = bundle

    @property
    def findings(self) -> Findings:
        """What the plugins of this process found wrong."""
        return _FINDINGS

    def hashes(self) -> Mapping[str, str]:
        """Return op name -> sha256 of its contract and launch plan, for every op with a plugin."""
        return plugin_hashes()

    def kernels(self, gpu: str, folder: Path | None = None) -> tuple[KernelFiles, str] | None:
        """Return the kernels for a GPU ("sm90") and their target: those in `folder`, or this installation's.

        None where neither has any for it.
        """
        for place in (folder, self._bundle):
            files = KernelFiles.load(place) if place is not None else None
            target = files.target_for(gpu) if files is not None else None
            if files is not None and target is not None:
                return files, target
        return None

    def targets(self, folder: Path | None = None) -> tuple[str, ...]:
        """Return the targets that `folder` or this installation has kernels for."""
        found = [KernelFiles.load(place) for place in (folder, self._bundle) if place is not None]
        return tuple(dict.fromkeys(target for files in found if files for target in files.targets))

    def problem(self, dtype: str, gpu: str, folder: Path | None = None) -> str | None:
        """Return why plugins in a graph of `dtype` cannot run on a GPU, and the way out; None if they can."""
        if dtype == "bfloat16" and self.kernels(gpu, folder) is not None:
            return None
        targets = self.targets(folder)
        if dtype == "bfloat16" and targets:
            missing = f"there are kernels for {', '.join(targets)} and none that run on {gpu}"
            fix = "compile them for it with `v4graph kernels build` or "
        elif dtype == "bfloat16":
            missing, fix = "no kernels are compiled here", "compile them with `v4graph kernels build` or "
        else:
            missing, fix = (
                f"the kernels compute in bfloat16 and this graph is {dtype}",
                "export it with --dtype bf16 or ",
            )
        if not installed("torch"):
            return (
                f"{missing}, and there is no torch to run the ops' references with; {fix}install torch with "
                "`pip install 'v4graph[export]'`"
            )
        if metadata.version("torch").endswith("+cpu"):
            return (
                f"{missing}, and torch, which would run the ops' references, is built without CUDA; "
                f"{fix}install a "
                "CUDA build of torch"
            )
        return None

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may be captured while the plugins run."""
        return _FINDINGS.launcher is not None and _FINDINGS.launcher.capturable

    def register(self, trt: Any) -> None:
        """Register the creator of every op with a TensorRT module; later calls do nothing.

        Raises:
            EngineError: TensorRT refuses one.
        """
        if trt.__name__ in _CREATORS:
            return
        _, creator_class = plugin_classes(trt, _FINDINGS)
        registry = trt.get_plugin_registry()
        creators = [creator_class(spec) for spec in PLUGIN_OPS]
        for creator in creators:
            if registry.register_creator(creator, "") is False:
                raise EngineError(
                    f"TensorRT refuses plugin {creator.name} version {creator.plugin_version}: another "
                    "library of this process has registered it; load only one of them."
                )
        _CREATORS[trt.__name__] = creators

    def use_launcher(self, dtype: str, gpu: str, folder: Path | None = None) -> None:
        """Choose how plugins run in a graph of `dtype` on a GPU: its kernels, else the ops' torch references.

        `folder` holds the kernels that an engine ships.

        Raises:
            EngineError: neither kernels nor torch are there.
        """
        found = self.kernels(gpu, folder) if dtype == "bfloat16" else None
        if found is not None:
            _FINDINGS.launcher = KernelLauncher(CudaDriver(*found))
        else:
            _FINDINGS.launcher = ReferenceLauncher("cuda")
