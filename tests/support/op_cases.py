"""Random inputs of every custom op, valid by the op's own meaning, for tests of any implementation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v4graph.launch import PLANS, Launch, evaluate_plan
from v4graph.numerics import BF16
from v4graph.ops import OPS_BY_NAME, OpSpec
from v4graph.ops.spec import WEIGHT, evaluate_dim
from v4graph_export.bodies import Variant


@dataclass(frozen=True)
class OpCase:
    """One call of an op: sizes of its symbols, attributes, and how far each slot has come.

    `weights` are the dtypes of its plain matrices, in turn.
    """

    op: str
    sizes: Mapping[str, int]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    start: tuple[int, ...] = (0, 5)
    num: tuple[int, ...] = (0, 0)
    scale: str = "int8"
    weights: tuple[str, ...] = ("float32",)

    @property
    def spec(self) -> OpSpec:
        return OPS_BY_NAME[self.op]

    @property
    def variant(self) -> Variant:
        structural = tuple((name, self.attributes[name]) for name in self.spec.structural)
        return Variant(self.op, structural, "float32", self.scale)

    def __str__(self) -> str:
        sizes = "-".join(f"{key}{value}" for key, value in self.sizes.items())
        weights = "" if self.weights == ("float32",) else f"-{'-'.join(self.weights)}"
        return f"{self.variant.name}-{sizes}-start{self.start}-num{self.num}{weights}"

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Return the input tensors by port name."""
        generator = torch.Generator().manual_seed(seed)
        inputs = {port.name: _tensor(self, port.name, generator) for port in self.spec.inputs}
        matrices = [port.name for port in self.spec.inputs if port.dtypes == WEIGHT]
        for name, dtype in zip(matrices, itertools.cycle(self.weights), strict=False):
            inputs[name] = inputs[name].to(getattr(torch, dtype))
        return inputs

    def launches(self) -> tuple[Launch, ...]:
        """Return what the op's plan launches for this call in a bf16 graph."""
        shapes = [_shape(self, port.name) for port in self.spec.inputs]
        dtypes = [
            "bfloat16"
            if "bfloat16" in port.dtypes
            else self.scale
            if "scale" in port.name
            else port.dtypes[0]
            for port in self.spec.inputs
        ]
        return evaluate_plan(PLANS[self.op], self.spec, self.attributes, shapes, dtypes).launches

    def reference(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the reference's outputs, always as a tuple."""
        attributes = (self.attributes[name] for name in self.spec.attributes)
        outputs = self.spec.reference(*inputs.values(), *attributes)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def _shape(case: OpCase, name: str) -> tuple[int, ...]:

    port = next(port for port in case.spec.inputs if port.name == name)
    symbols = {"B": len(case.start), **case.sizes}
    return tuple(evaluate_dim(dim, symbols) for dim in port.dims)


def _tensor(case: OpCase, name: str, generator: torch.Generator) -> Tensor:
    """Make one input: special ports by name, int8 by meaning, the rest normal."""
    shape = _shape(case, name)
    special: dict[str, Callable[[], Tensor]] = {
        "start": lambda: torch.tensor(case.start, dtype=torch.int32),
        "num": lambda: torch.tensor(case.num, dtype=torch.int32),
        "freqs": lambda: 10000.0 ** -(torch.arange(shape[0]) / shape[0]),
        "ids": lambda: torch.randint(0, case.sizes["E"], shape, generator=generator, dtype=torch.int32),
        "table": lambda: torch.randint(0, case.sizes["E"], shape, generator=generator),
        "tokens": lambda: torch.randint(0, case.sizes["V"], shape, generator=generator),
        "rows": lambda: _selection(shape, case.sizes["N"], generator),
        "norm": lambda: 1 + 0.2 * torch.randn(shape, generator=generator),
        "comb": lambda: torch.rand(shape, generator=generator),
    }
    if name in special:
        return special[name]()
    port = next(port for port in case.spec.inputs if port.name == name)
    if "scale" in name and "int8" in port.dtypes:
        if case.scale == "float32" and "float32" in port.dtypes:
            return 0.001 + 0.001 * torch.rand(shape, generator=generator)
        return torch.randint(117, 122, shape, generator=generator, dtype=torch.int8)
    if port.dtypes == ("int8",):
        codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        # e4m3 has no infinities; 0x7f and 0xff are NaN and never stored.
        return torch.where(codes & 127 == 127, codes - 1, codes).view(torch.int8)
    spread = 0.05 if name == "fn" else 1.0
    return spread * torch.randn(shape, generator=generator)


def _selection(shape: tuple[int, ...], rows: int, generator: torch.Generator) -> Tensor:
    """Distinct rows per query, with -1 at the end as the indexer leaves it."""
    order = torch.rand((*shape[:-1], rows), generator=generator).argsort(-1)[..., : shape[-1]]
    order = torch.nn.functional.pad(order, (0, shape[-1] - order.shape[-1]), value=-1)
    order[..., shape[-1] // 2 :] = torch.where(
        torch.rand(shape[:-1], generator=generator)[..., None] < 0.5, -1, order[..., shape[-1] // 2 :]
    )
    return order.int()


_CHUNKS = (
    # tokens, where each slot stands, how many of the tokens are its own
    (1, (0, 127), (1, 1)),
    (1, (131, 3), (1, 0)),
    (7, (125, 0), (5, 7)),
    (150, (0, 250), (150, 33)),
)


def _positional(op: str, sizes: Mapping[str, int], attributes: Mapping[str, Any]) -> Iterator[OpCase]:
    for tokens, start, num in _CHUNKS:
        yield OpCase(op, {"S": tokens, **sizes}, attributes, start, num)


def as_numpy(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a tensor's own memory, bf16 with the type of ml_dtypes."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    return tensor.numpy()


def all_cases() -> Iterator[OpCase]:
    """Yield every op and structural variant at several shapes; plain matrices in every dtype."""
    for case in _cases():
        yield case
        matrices = sum(port.dtypes == WEIGHT for port in case.spec.inputs)
        if matrices:
            yield replace(case, weights=("bfloat16",))
        if matrices > 1:
            yield replace(case, weights=("bfloat16", "float32"))


def _cases() -> Iterator[OpCase]:
    eps = {"eps": 1e-6}
    hyper = {**eps, "hc_eps": 1e-6}
    for tokens in (1, 33):
        one = {"S": tokens}
        yield OpCase("V4HyperPre", {**one, "D": 128}, {"iters": 20, **hyper})
        yield OpCase("V4HyperPost", {**one, "D": 128})
        yield OpCase("V4HyperHead", {**one, "D": 128}, hyper)
        yield OpCase("V4RmsNorm", {**one, "D": 128}, eps)
        for name in ("V4Linear", "V4LinearF32"):
            yield OpCase(name, {**one, "K": 96, "O": 130})
        for scale in ("int8", "float32"):
            yield OpCase("V4Fp8Linear", {**one, "K": 128, "O": 256, "OB": 2, "KB": 1}, scale=scale)
            yield OpCase("V4Fp8Linear", {**one, "K": 384, "O": 200, "OB": 2, "KB": 3}, scale=scale)
            sizes = {**one, "H": 4, "Dh": 128, "O": 96, "K": 256, "OB": 1, "KB": 2}
            yield OpCase("V4Fp8GroupedOutput", sizes, {"groups": 2}, scale=scale)
        yield OpCase("V4GroupedOutput", {**one, "H": 4, "Dh": 128, "O": 96, "K": 256}, {"groups": 2})
        yield OpCase("V4RouteTopK", {**one, "D": 128, "E": 16}, {"topk": 3, "scale": 1.5})
        yield OpCase("V4RouteHash", {**one, "D": 128, "E": 16, "V": 61, "K": 3}, {"scale": 1.5})
        yield from _moe(one)
    for quantise in (0, 1):
        sizes = {"Q": 3 * 192, "Dh": 192, "F": 32}
        yield from _positional("V4AttentionPrep", sizes, {"quantise": quantise, **eps})
        index = {"Q": 16 * 128, "Hi": 16, "C": 128, "F": 32, "N": 100}
        attributes = {"topk": 24, "ratio": 4, "quantise": quantise, "scale": 128**-0.5 * 0.25}
        yield from _positional("V4IndexTopK", index, attributes)
    yield from _compress(eps)
    yield from _attention()
    yield from _fused()


def _moe(one: Mapping[str, int]) -> Iterator[OpCase]:
    sizes = {**one, "D": 256, "K": 2, "E": 5, "I": 128, "Is": 128, "IsB": 1, "DB": 2}
    limit = {"limit": 0.6}
    yield OpCase("V4MoEFloat", sizes, limit)
    yield OpCase("V4MoE", {**sizes, "D2": 128, "DS": 8, "I2": 64, "IS": 4}, limit)
    yield OpCase("V4MoEFp8", {**sizes, "IB": 1}, limit, scale="float32")
    yield OpCase("V4MoEFp8", {**sizes, "IB": 1}, limit)
    rows = {"N": one["S"], "D": 256, "I": 128}
    yield OpCase("V4ExpertFloat", rows, limit)
    yield OpCase("V4ExpertFp4", {**rows, "D2": 128, "DS": 8, "I2": 64, "IS": 4}, limit)
    for scale in ("int8", "float32"):
        yield OpCase("V4ExpertFp8", {**rows, "IB": 1, "DB": 2}, limit, scale=scale)


def _compress(eps: Mapping[str, float]) -> Iterator[OpCase]:
    for quantise in ("none", "kv"):
        wide = {"C": 192, "F": 32, "N": 4}
        attributes = {"overlap": 0, "quantise": quantise, **eps}
        yield from _positional("V4Compress", {**wide, "CC": 192, "R": 128, "L": 136}, attributes)
        attributes = {"overlap": 1, "quantise": quantise, **eps}
        yield from _positional("V4Compress", {**wide, "CC": 384, "R": 4, "L": 16, "N": 128}, attributes)
    index = {"C": 128, "CC": 256, "F": 32, "R": 4, "L": 16, "N": 128}
    yield from _positional("V4Compress", index, {"overlap": 1, "quantise": "index", **eps})


def _attention() -> Iterator[OpCase]:
    sizes = {"H": 3, "Dh": 128, "F": 32, "L": 136}
    attributes = {"window": 128, "scale": 128**-0.5}
    yield from _positional("V4WindowAttention", sizes, attributes)
    yield from _positional("V4CompressedAttention", {**sizes, "N": 4}, {**attributes, "ratio": 128})
    yield from _positional("V4SelectedAttention", {**sizes, "N": 100, "K": 24}, attributes)
    yield from _positional("V4SelectedAttention", {**sizes, "N": 10, "K": 24}, attributes)


def _fused() -> Iterator[OpCase]:
    eps = {"eps": 1e-6}
    rows = {
        "K": 256,
        "KB": 2,
        "Oq": 130,
        "OqB": 2,
        "Okv": 40,
        "OkvB": 1,
        "Oc": 24,
        "Oi": 16,
        "OiB": 1,
        "Ow": 8,
    }
    for tokens in (1, 33):
        yield OpCase("V4HyperPostPre", {"S": tokens, "D": 128}, {"iters": 20, **eps, "hc_eps": 1e-6})
        for scale in ("int8", "float32"):
            for op in ("V4WindowProjections", "V4HcaProjections", "V4CsaProjections"):
                yield OpCase(op, {"S": tokens, **rows}, scale=scale)
            for op in ("V4QueryProjection", "V4CsaQueryProjections"):
                yield OpCase(op, {"S": tokens, **rows}, eps, scale=scale)
    queries = {"Q": 3 * 192, "Dh": 192, "F": 32, "C": 192}
    yield from _positional("V4HcaPrep", {**queries, "CC": 192, "R": 128, "L": 136, "N": 4}, eps)
    csa = {**queries, "CC": 384, "R": 4, "L": 16, "N": 128, "I": 128, "IC": 256}
    yield from _positional("V4CsaPrep", csa, eps)
