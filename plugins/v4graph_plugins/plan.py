"""Lowered graph to plan: TensorRT's parser, profiles and builder, with its failures put into our words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4graph.errors import EngineError
from v4graph.manifest import Manifest, Profile
from v4graph.targets import PORTABLE, number
from v4graph.trt import TensorRT
from v4graph_plugins.host import Host
from v4graph_plugins.lowering import Lowered
from v4graph_plugins.profiles import dynamic_shapes
from v4graph_plugins.reports import Progress, logger_class, monitor_class


@dataclass(frozen=True)
class PlanOptions:
    """Options handed through to TensorRT.

    Attributes:
        optimization_level: 0 (build fast) to 5 (run fast); None leaves TensorRT's default.
        timing_cache: File of measured tactics, read if there and written back; full TensorRT only, as
            TensorRT for RTX measures nothing when it builds.
        weight_streaming: Let weights inside the plan be streamed from the host; needs embedded weights.
    """

    optimization_level: int | None = None
    timing_cache: Path | None = None
    weight_streaming: bool = False


@dataclass(frozen=True)
class Plan:
    """A built plan: its bytes, its number of network layers, the optimization level it was built at."""

    data: Any
    layers: int
    plugin_layers: int
    optimization_level: int


class PlanBuilder:
    """One network of one TensorRT, parsed once and built for some targets."""

    def __init__(self, tensorrt: TensorRT, lowered: Lowered, model_path: Path) -> None:
        """Parse the lowered graph; external data is looked for beside `model_path`.

        Raises:
            EngineError: TensorRT cannot parse it; names the node, its layer kind and what plugins found.
        """
        self._trt, self._tensorrt, self._lowered = tensorrt.module, tensorrt, lowered
        self._host = Host()
        self._host.register(self._trt)
        self._host.findings.take()
        self._logger = logger_class(self._trt)()
        self._builder = self._trt.Builder(self._logger)
        self._network = self._builder.create_network(self._network_flags())
        self._parser = self._trt.OnnxParser(self._network, self._logger)
        if not self._parser.parse(lowered.onnx, str(model_path)):
            raise self._parse_error(model_path)

    def _network_flags(self) -> int:
        flags = self._trt.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0

    def _parse_error(self, path: Path) -> EngineError:
        findings, said = self._host.findings.take(), self._logger.take()
        first = self._parser.get_error(0) if self._parser.num_errors else None
        place = self._lowered.places.get(first.node_name() if first else "") or self._named_in(said)
        if findings:
            text = findings[0]
        else:
            op = f" (op {first.node_operator()})" if first else ""
            text = (
                f"{path}: {self._tensorrt.package} {self._tensorrt.version} cannot parse node "
                f"{place or 'of the graph'}{op}; export it again with `v4graph export`, or if the op has a "
                "plugin, do not leave it out with --no-plugin."
            )
        detail = said or (f"TensorRT: {first.desc()}" if first else "")
        return EngineError(self._with_kind(text), detail=detail)

    def _with_kind(self, text: str) -> str:
        """Put the layer kind behind the node name that a finding begins with."""
        node, colon, rest = text.partition(":")
        return self._lowered.places.get(node, node) + colon + rest

    def _named_in(self, said: str) -> str:
        """Return the place of the node that TensorRT's messages name, inside a body too; "" if none."""
        found = [node for node in self._lowered.places if node in said]
        return self._lowered.places[max(found, key=len)] if found else ""

    @property
    def plugin_layers(self) -> list[str]:
        """The names of the plugin layers, in order."""
        kind = self._trt.LayerType.PLUGIN_V3
        layers = (self._network.get_layer(i) for i in range(self._network.num_layers))
        return [layer.name for layer in layers if layer.type == kind]

    def build(
        self,
        manifest: Manifest,
        targets: Sequence[str],
        profiles: Sequence[Profile],
        options: PlanOptions,
        progress: Progress,
    ) -> Plan:
        """Build the plan.

        Raises:
            EngineError: TensorRT cannot build it; its messages are the detail.
        """
        config = self._builder.create_builder_config()
        config.set_preview_feature(self._trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        monitor = monitor_class(self._trt)(progress)
        config.progress_monitor = monitor
        self._set_targets(config, targets)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.weight_streaming:
            config.set_flag(self._trt.BuilderFlag.WEIGHT_STREAMING)
        for profile in profiles:
            self._add_profile(config, manifest, profile)
        self._read_timing_cache(config, options.timing_cache)
        data = self._builder.build_serialized_network(self._network, config)
        if data is None:
            raise self._build_error(targets)
        self._write_timing_cache(config, options.timing_cache)
        level = int(config.builder_optimization_level)
        return Plan(memoryview(data), self._network.num_layers, len(self.plugin_layers), level)

    def _set_targets(self, config: Any, targets: Sequence[str]) -> None:
        trt = self._trt
        if not self._tensorrt.rtx:
            if tuple(targets) == (PORTABLE,):
                config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
            return
        if tuple(targets) == (PORTABLE,):
            return  # no compute capability set is TensorRT for RTX's portable plan
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number(target)}"), index)

    def _add_profile(self, config: Any, manifest: Manifest, profile: Profile) -> None:
        shapes = self._builder.create_optimization_profile()
        names = {self._network.get_input(i).name for i in range(self._network.num_inputs)}
        for name, bounds in dynamic_shapes(manifest, profile):
            if name not in names:
                raise EngineError(
                    f"the manifest names input '{name}', which the graph does not have; export it again with "
                    "`v4graph export`."
                )
            shapes.set_shape(name, *bounds)
        if config.add_optimization_profile(shapes) < 0:
            raise EngineError(
                f"TensorRT refuses the {profile.name} profile: its shapes are outside the graph's; "
                "export it again with `v4graph export`.",
                detail=self._logger.take(),
            )

    def _build_error(self, targets: Sequence[str]) -> EngineError:
        findings, said = self._host.findings.take(), self._logger.take()
        if findings:
            return EngineError(self._with_kind(findings[0]), detail=said)
        named = self._named_in(said)
        bodies = ", ".join(self._lowered.bodies)
        fix = (
            f"the bodies of {bodies} run as native layers: give them back their plugins"
            if bodies
            else "build with --verbose for the whole log, and try another --target"
        )
        return EngineError(
            f"{named + ': ' if named else ''}{self._tensorrt.package} {self._tensorrt.version} cannot build "
            f"the graph for {', '.join(targets)}; {fix}.",
            detail=said,
        )

    def _read_timing_cache(self, config: Any, path: Path | None) -> None:
        if path is not None and not self._tensorrt.rtx:  # deprecated and without effect there
            cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
            config.set_timing_cache(cache, ignore_mismatch=False)

    def _write_timing_cache(self, config: Any, path: Path | None) -> None:
        cache = config.get_timing_cache() if path is not None and not self._tensorrt.rtx else None
        if path is None or cache is None:
            return
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(memoryview(cache.serialize()))
        partial.replace(path)
