"""The trtexec command line that builds the same plan."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from v4graph.manifest import Manifest, Profile
from v4graph.targets import PORTABLE, number
from v4graph_plugins.build import BuildOptions
from v4graph_plugins.profiles import dynamic_shapes


def trtexec_line(
    manifest: Manifest,
    onnx: Path,
    plan: Path,
    targets: Sequence[str],
    profiles: Sequence[Profile],
    options: BuildOptions,
    *,
    rtx: bool,
) -> str:
    """Return the line for `onnx`, the lowered graph; plugins must come from a library (--dynamicPlugins)."""
    words = [
        "tensorrt_rtx" if rtx else "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        "--skipInference",
    ]
    if not rtx:
        words.append("--stronglyTyped")
    words.append("--preview=+aliasedPluginIO1003")
    if rtx and tuple(targets) != (PORTABLE,):
        words.append("--computeCapabilities=" + ",".join(_dotted(target) for target in targets))
    elif not rtx and tuple(targets) == (PORTABLE,):
        words.append("--hardwareCompatibilityLevel=ampere+")
    if options.plan.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.plan.optimization_level}")
    if options.plan.timing_cache is not None:
        words.append(f"--timingCacheFile={options.plan.timing_cache}")
    if options.plan.weight_streaming:
        words.append("--allowWeightStreaming")
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        shapes = list(dynamic_shapes(manifest, profile))
        for bound, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
            parts = (f"{name}:{'x'.join(map(str, sizes[bound]))}" for name, sizes in shapes)
            words.append(f"--{flag}={','.join(parts)}")
    return " ".join(shlex.quote(word) for word in words)


def _dotted(target: str) -> str:
    return f"{number(target) // 10}.{number(target) % 10}"
