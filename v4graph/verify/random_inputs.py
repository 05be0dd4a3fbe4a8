"""Random inputs of a graph, valid by what each one means: what passes are checked on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sizes:
    """Slots, new tokens and the tokens that caches hold; `start` and `num` are one number per slot."""

    start: tuple[int, ...] = (0, 131)
    num: tuple[int, ...] = (5, 4)
    tokens: int = 5
    capacity: int = 512

    def dim(self, dim: int | str) -> int:
        """Return the size of a dimension: a number, B, S or C<ratio>."""
        if isinstance(dim, int):
            return dim
        return {"B": len(self.start), "S": self.tokens}.get(dim) or self.capacity // int(dim[1:])


def widened(array: Array) -> Array:
    """Return a bf16 array in float32, which every reader of numpy's files knows; others as they are."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def random_inputs(
    ports: Mapping[str, tuple[str, tuple[int | str, ...]]], sizes: Sizes, seed: int = 0
) -> dict[str, Array]:
    """Return an array for each graph input, given as name -> (dtype, shape).

    Weights are spread so that activations stay of order one; FP8 bytes are never NaN; ids and experts exist.
    """
    generator = np.random.default_rng(seed)
    shapes = {name: tuple(sizes.dim(dim) for dim in shape) for name, (_, shape) in ports.items()}
    vocabulary = shapes["embed.weight"][0] if "embed.weight" in shapes else 1 << 15
    special: dict[str, Array] = {
        "start_pos": np.array(sizes.start, np.int32),
        "num_tokens": np.array(sizes.num, np.int32),
        "input_ids": generator.integers(0, vocabulary, (len(sizes.start), sizes.tokens)),
    }
    arrays = {}
    for name, (dtype, _) in ports.items():
        if name in special:
            arrays[name] = special[name]
        elif name.endswith("tid2eid"):
            experts = shapes[name.replace("tid2eid", "weight")][0]
            arrays[name] = _table(shapes[name], experts, generator)
        else:
            arrays[name] = _tensor(name, dtype, shapes[name], generator)
    return arrays


def _table(shape: tuple[int, ...], experts: int, generator: np.random.Generator) -> Array:
    """Different experts in a row."""
    first = generator.integers(0, experts, shape[:1])[:, None]
    return (first + np.arange(shape[1])) % experts


def _tensor(name: str, dtype: str, shape: tuple[int, ...], generator: np.random.Generator) -> Array:
    if dtype == "int8":
        if name.endswith("scale"):
            return generator.integers(117, 122, shape, np.int8)
        codes = generator.integers(0, 256, shape, np.uint8)
        # e4m3 has no infinities; 0x7f and 0xff are NaN and never stored.
        return np.where(codes & 127 == 127, codes - 1, codes).view(np.int8)
    values = generator.standard_normal(shape, np.float32)
    if "norm" in name:
        values = 1 + 0.2 * values
    elif name.endswith("_fn"):
        values *= 0.05
    elif name.startswith("state."):
        values *= 0.5
    elif name.endswith("scale"):
        values = 0.001 + 0.001 * abs(values) if len(shape) > 1 else 0.5 + 0.2 * values
    elif name.endswith("weight") and len(shape) > 1 and name != "embed.weight":
        values *= 1 / math.sqrt(shape[-1])
    return values.astype(dtype)
