"""`Host`: this installation's plugins, as the runtime and the builder find them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError
from v4graph.trt import installed
from v4graph_plugins.catalogue import BUNDLE, PLUGIN_OPS, bundle_index, plugin_hashes
from v4graph_plugins.plugin import Findings, plugin_classes
from v4graph_plugins.reference_launcher import ReferenceLauncher

# TensorRT's registry is one per process and does not keep Python creators alive; neither may go.
_FINDINGS = Findings()
_CREATORS: dict[str, list[Any]] = {}


class Host:
    """The plugins of this installation; `bundle` is the folder of their kernels."""

    def __init__(self, bundle: Path = BUNDLE) -> None:
        self._bundle = bundle

    @property
    def findings(self) -> Findings:
        """What the plugins of this process found wrong."""
        return _FINDINGS

    def hashes(self) -> Mapping[str, str]:
        """Return op name -> sha256 of its contract and kernels, for every op with a plugin."""
        return plugin_hashes(self._bundle)

    def targets(self) -> tuple[str, ...]:
        """Return the targets that the kernel bundle has; none without a bundle."""
        return tuple(bundle_index(self._bundle) or ())

    def problem(self) -> str | None:
        """Return why the plugins cannot run on a GPU, with the way out; None if they can."""
        if installed("torch"):
            if not metadata.version("torch").endswith("+cpu"):
                return None
            return (
                "this installation has no kernels for its plugins, and its torch, which would run their "
                "references, is built without CUDA; install a CUDA build of torch"
            )
        return (
            "this installation has no kernels for its plugins, and no torch to run their references with; "
            "install torch with `pip install 'v4graph[export]'`"
        )

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

    def use_launcher(self, device: str = "cuda") -> None:
        """Choose how plugins run: the op references, as long as there are no kernels.

        Raises:
            EngineError: neither kernels nor torch are there.
        """
        _FINDINGS.launcher = ReferenceLauncher(device)
