"""Steps of a model and random inputs of their op calls, and torch's way to do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from v4graph.config import ModelConfig
from v4graph.launch.calls import Call, Chunk, head_calls
from v4graph.launch.fused_calls import fused_layer_calls
from v4graph.ops.rounding import decode_fp8

CONTEXTS = (4096, 131072, 1048576 - 64)


@dataclass(frozen=True)
class Workload:
    """A step of a model: every slot has `context` tokens before its `tokens` new ones."""

    name: str
    batch: int
    tokens: int
    context: int

    @property
    def chunk(self) -> Chunk:
        """The chunk, with room for context and tokens."""
        capacity = -(-(self.context + self.tokens) // 128) * 128
        return Chunk(self.batch, self.tokens, capacity)


WORKLOADS = (
    *(Workload(f"decode B={b} {c // 1024}K", b, 1, c) for c in CONTEXTS for b in (1, 8, 64)),
    *(Workload(f"prefill {s // 1024}K", 1, s, 0) for s in (2048, 8192)),
)


def distinct_calls(config: ModelConfig, work: Workload) -> Iterator[Call]:
    """Yield every op call of an optimised graph's step once, whatever layers and weights it is for."""
    seen = set()
    for layer in {layer.kind: layer for layer in config.layers}.values():
        for call in fused_layer_calls(config, layer, work.chunk):
            if call.key not in seen:
                seen.add(call.key)
                yield call
    yield from head_calls(config, work.chunk)


def inputs_of(call: Call, context: int) -> list[Tensor]:
    """Return random inputs that mean something: bytes that are codes, rows that exist, positions in range."""
    sizes, generator = call.sizes, torch.Generator(torch.get_default_device()).manual_seed(0)

    def make(name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        if name == "start":
            return torch.full(shape, context, dtype=torch.int32)
        if name == "num":
            return torch.full(shape, sizes["S"], dtype=torch.int32)
        if name == "freqs":
            return 160000.0 ** -(torch.arange(shape[0]) / shape[0])
        if name in ("ids", "table"):
            scores = torch.rand((*shape[:-1], sizes["E"]), generator=generator)
            return scores.topk(shape[-1]).indices.to(getattr(torch, dtype))
        if name == "rows":
            # A selection without repeats: a random offset, then every n-th row.
            step = max(1, sizes["N"] // shape[-1])
            begin = torch.randint(0, step, (*shape[:-1], 1), generator=generator)
            rows = begin + torch.arange(shape[-1]) * step
            return torch.where(rows < sizes["N"], rows, -1).int()
        if name == "tokens":
            return torch.randint(0, sizes["V"], shape, generator=generator)
        if "scale" in name and dtype == "int8":
            return torch.randint(117, 122, shape, generator=generator, dtype=torch.int8)
        if dtype == "int8":
            codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            return torch.where(codes & 127 == 127, codes - 1, codes).view(torch.int8)
        small = name.startswith(("compressor_w", "index_w", "weights_proj"))
        spread = 0.05 if small else {"fn": 0.02, "gate": 0.05, "weight": 0.05}.get(name, 1.0)
        return (spread * torch.randn(shape, generator=generator)).to(getattr(torch, dtype))

    return [
        make(port.name, shape, dtype)
        for port, shape, dtype in zip(call.spec.inputs, call.shapes, call.dtypes, strict=True)
    ]


def torch_work(call: Call, inputs: list[Tensor]) -> Callable[[], Any]:
    """Return torch's way: a bf16 product with weights decoded beforehand for linears, else the reference."""
    if call.op in ("V4Linear", "V4LinearF32", "V4Fp8Linear"):
        x = inputs[0]
        weight = inputs[1] if call.op != "V4Fp8Linear" else decode_fp8(inputs[1], inputs[2]).bfloat16()
        return lambda: torch.nn.functional.linear(x, weight)
    attributes = [call.attributes[name] for name in call.spec.attributes]
    return lambda: call.spec.reference(*inputs, *attributes)


def reference_bytes(call: Call) -> int:
    """Return about how much memory the reference's largest intermediate takes."""
    s = {"H": 1, "Dh": 1, "N": 0, "K": 0, "L": 0, "Q": 1, **call.sizes}
    tokens = s["B"] * s["S"]
    if call.op.endswith("Attention"):
        keys = s["L"] + s["S"] + (s["N"] if call.op == "V4CompressedAttention" else s["K"])
        return 4 * tokens * (3 * s["H"] * keys + (2 * s["K"] * s["Dh"] if s["K"] else 0))
    if call.op == "V4IndexTopK":
        return 12 * tokens * s["Hi"] * s["N"]
    return 0
