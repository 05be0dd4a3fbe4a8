"""What compiled kernels must hold before they ship: each GPU's limits, and the launch plans."""

from __future__ import annotations

from collections.abc import Iterator

from v4graph.config import ModelConfig
from v4graph.launch import PLANS, Launch
from v4graph.launch.calls import Chunk, head_calls, layer_calls
from v4graph.launch.fused_calls import fused_layer_calls
from v4graph.targets import PORTABLE
from v4graph_plugins.kernel_files import KernelFiles

# Shared memory that a block can have.
SHARED_LIMITS = {
    "sm80": 166912,
    "sm86": 101376,
    "sm89": 101376,
    "sm90": 232448,
    "sm100": 232448,
    "sm120": 101376,
    "sm121": 101376,
    PORTABLE: 101376,
}
# Bytes that kernels outside the hot paths may spill: unquantised weights, many tokens at a time. The wide
# attentions hold 192 registers of sums and queries; on sm100 and sm120 one or two find no place.
MAY_SPILL = {
    "attention_wide.v4_compressed_attention_64": 16,
    "attention_wide.v4_window_attention_64": 16,
    "attention_wide.v4_selected_attention_64": 16,
    "linear.v4_linear_many": 16,
    "linear.v4_linear_f32_many": 16,
    "moe.v4_moe_float_down_32": 48,
    "moe_tiles.v4_moe_float_down_64": 48,
}
NEWEST_PTX = (9, 0)  # of CUDA 13.0's driver
LETTERS = {"input": "p", "output": "p", "workspace": "p", "int32": "i", "float32": "f"}
CHUNKS = (
    Chunk(1, 1, 4096),
    Chunk(8, 1, 131072),
    Chunk(64, 1, 1048576),
    Chunk(3, 9, 8192),
    Chunk(2, 40, 8192),
    Chunk(1, 8192, 8192),
    Chunk(1, 8192, 1048576),
)


def launches() -> Iterator[Launch]:
    """Yield every launch of Flash and Pro over decode, ragged chunks and prefill, up to 1M tokens."""
    for model in ("flash", "pro"):
        config = ModelConfig.load(model)
        for layer in {layer.kind: layer for layer in config.layers}.values():
            for chunk in CHUNKS:
                for call in (
                    *layer_calls(config, layer, chunk),
                    *fused_layer_calls(config, layer, chunk),
                    *head_calls(config, chunk),
                ):
                    yield from call.launches(PLANS).launches


def problems(files: KernelFiles) -> list[str]:
    """Return what is wrong, a sentence each."""
    found = [*_compiled(files)]
    isa = tuple(int(part) for part in files.index["ptx_isa"].split("."))
    if isa > NEWEST_PTX:
        found.append(f"PTX ISA {files.index['ptx_isa']}, drivers of CUDA 13.0 take 9.0")
    known = files.index["kernels"]
    for plan in PLANS.values():
        for step in plan.steps:
            if step.kernel not in known:
                found.append(f"{plan.op}: its plan launches {step.kernel}, which is not in the bundle")
            elif step.block != known[step.kernel]["threads"]:
                found.append(
                    f"{step.kernel}: launched with {step.block} threads, compiled for another number"
                )
    for launch in launches():
        if launch.kernel in known:
            found += _launched(files, launch)
    return list(dict.fromkeys(found))


def _compiled(files: KernelFiles) -> Iterator[str]:
    for target, part in files.index["targets"].items():
        for unit, file in part["files"].items():
            for kernel, used in file.get("resources", {}).items():
                moved = used["spill_stores"] + used["spill_loads"]
                if moved > MAY_SPILL.get(f"{unit}.{kernel}", 0):
                    yield f"{unit}.{kernel}: moves {moved} bytes of spilled registers on {target}"
                if used["shared"] > 1024:
                    yield f"{unit}.{kernel}: has static shared memory on {target}; use dynamic"


def _launched(files: KernelFiles, launch: Launch) -> Iterator[str]:
    given = "".join(LETTERS[argument.kind] for argument in launch.arguments)
    if given != files.signature(launch.kernel):
        yield f"{launch.kernel}: takes ({files.signature(launch.kernel)}), its plan passes ({given})"
    for target in files.targets:
        if launch.shared > SHARED_LIMITS[target]:
            yield (
                f"{launch.kernel}: {launch.shared} bytes of shared memory, {target} has "
                f"{SHARED_LIMITS[target]}"
            )
    if max(launch.grid[1:]) > 65535 or launch.grid[0] > 2**31 - 1:
        yield f"{launch.kernel}: grid {launch.grid} is too large"
