"""Tensors, bytes and parameters of a checkpoint by type and by part, without listing every expert.

Source: `v4graph.inventory`, which equals the published indexes; tests compare the sums.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from v4graph.config import ModelConfig, WeightFormat
from v4graph.config.types import OFFICIAL
from v4graph.inventory import (
    Role,
    StoredTensor,
    TensorSpec,
    layer_tensors,
    model_tensors,
    mtp_tensors,
    part_of,
    stored,
)


@dataclass
class Tally:
    """Tensors and bytes by type and by part."""

    tensors: int = 0
    bytes: int = 0
    by_type: Counter[str] = field(default_factory=Counter)
    by_part: Counter[str] = field(default_factory=Counter)

    def add(self, tensor: StoredTensor, part: str, count: int) -> None:
        """Count a tensor `count` times."""
        self.tensors += count
        self.bytes += count * tensor.nbytes
        self.by_type[tensor.dtype] += count
        self.by_part[part] += count * tensor.nbytes


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights, scales and lookup tables left out.

    `active` are those that a token of the main model is multiplied with: all but the embedding table and
    the experts that it does not choose.
    """

    main: int
    mtp: int
    active: int


def plan_format(config: ModelConfig, weights: WeightFormat | None = None) -> WeightFormat:
    """Return the stored form that is planned with: the checkpoint's, or the official one if unquantised."""
    found = weights or config.weight_format
    return found if found.quantised else OFFICIAL


def counted(config: ModelConfig, mtp: bool) -> Iterator[tuple[TensorSpec, int]]:
    """Yield the weights of the main model, or of the MTP modules, with how often each is there."""
    if mtp:
        groups = [(mtp_tensors(config, k), 1) for k in range(len(config.mtp_layers))]
    else:
        kinds = Counter(config.layers)
        groups = [(model_tensors(config), 1)]
        groups += [(layer_tensors(config, layer), count) for layer, count in kinds.items()]
    for specs, count in groups:
        for spec in specs:
            yield spec, count * (config.n_routed_experts if spec.role is Role.EXPERT else 1)


def tally(config: ModelConfig, weights: WeightFormat, mtp: bool | None = None) -> Tally:
    """Return what a checkpoint holds; with `mtp`, only the MTP modules, or only the rest (False)."""
    found = Tally()
    for kind in (False, True) if mtp is None else (mtp,):
        for spec, count in counted(config, kind):
            part = "multi-token prediction" if kind else part_of(spec.name)
            for tensor in stored(spec, weights):
                found.add(tensor, part, count)
    return found


def parameters(config: ModelConfig) -> Parameters:
    """Return the numbers of parameters."""
    main = _parameters(counted(config, mtp=False))
    active = 0
    for spec, count in counted(config, mtp=False):
        if spec.role is not Role.INT64 and spec.name != "embed.weight":
            chosen = count * math.prod(spec.shape)
            if spec.role is Role.EXPERT:
                chosen = chosen * config.num_experts_per_tok // config.n_routed_experts
            active += chosen
    return Parameters(main, _parameters(counted(config, mtp=True)), active)


def _parameters(specs: Iterator[tuple[TensorSpec, int]]) -> int:
    return sum(count * math.prod(spec.shape) for spec, count in specs if spec.role is not Role.INT64)


@dataclass(frozen=True)
class Resident:
    """Bytes of weights that an engine in bf16 holds: outside the layers, and in each layer.

    `experts` are the bytes of the routed experts of each layer, `one_expert` of a single one.
    """

    outside: int
    dense: tuple[int, ...]
    experts: tuple[int, ...]
    one_expert: int

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return self.outside + sum(self.dense) + sum(self.experts)


def resident(config: ModelConfig, weights: WeightFormat, float_bytes: int = 2) -> Resident:
    """Return the bytes of the graph's weight inputs; `float_bytes` is the item size of its dtype.

    FP8, FP4, scales, float32 and lookup tables stay as stored. MTP modules are not part of the graph.
    """

    def nbytes(spec: TensorSpec) -> int:
        return sum(
            math.prod(tensor.shape) * float_bytes if tensor.dtype == "BF16" else tensor.nbytes
            for tensor in stored(spec, weights)
        )

    sizes = {layer: [0, 0] for layer in config.layers}
    for layer, parts in sizes.items():
        for spec in layer_tensors(config, layer):
            parts[spec.role is Role.EXPERT] += nbytes(spec)
    one = next(iter(sizes.values()))[1]
    return Resident(
        outside=sum(nbytes(spec) for spec in model_tensors(config)),
        dense=tuple(sizes[layer][0] for layer in config.layers),
        experts=tuple(sizes[layer][1] * config.n_routed_experts for layer in config.layers),
        one_expert=one,
    )
