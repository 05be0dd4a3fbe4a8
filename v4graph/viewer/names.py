"""What the names of a graph's tensors say: weight, state or activation, and which part of the model an op is.

Names are made equal for equal layers: `layers.3.attn.wq_a.weight` in a graph with inlined layers and
`attn.wq_a.weight` in a layer function are one weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from v4graph.manifest import Manifest
from v4graph.passes.measure import NodeFacts, Tensor

Kind = Literal["weight", "state", "input", "constant", "activation"]

# In the order of the stacks and of the legend.
PARTS = (
    "experts",
    "projections",
    "attention",
    "indexer",
    "compressor",
    "router",
    "hyper-connections",
    "embedding and head",
    "other",
)
# The first fragment found in an op's name says its part, unless its weights are the indexer's or a
# compressor's.
_OPS = (
    ("V4Hyper", "hyper-connections"),
    ("V4MoE", "experts"),
    ("V4Expert", "experts"),
    ("V4Route", "router"),
    ("V4IndexTopK", "indexer"),
    ("V4Compress__", "compressor"),
    ("Projection", "projections"),
    ("Linear", "projections"),
    ("GroupedOutput", "projections"),
    ("Attention", "attention"),
    ("Prep", "attention"),
    ("RmsNorm", "attention"),
)
_LAYER = re.compile(r"^layers\.\d+\.")
_STATE = re.compile(r"^state\.(?:\{i\}|\d+)\.")
_NEXT = re.compile(r"^next\.(?:\{i\}|\d+)\.")


def plain(name: str) -> str:
    """Return a tensor's name without its layer, as a layer function has it."""
    name = _LAYER.sub("", name.replace("{i}", "0"))
    return _NEXT.sub("next_", _STATE.sub("", name))


@dataclass(frozen=True)
class Names:
    """The tensors that a manifest declares, by plain name."""

    weights: frozenset[str]
    states: frozenset[str]
    inputs: frozenset[str]

    @classmethod
    def of(cls, manifest: Manifest) -> Names:
        """Read them from a manifest."""
        return cls(
            frozenset(plain(binding.input) for binding in manifest.bindings),
            frozenset(plain(name) for state in manifest.states for name in (state.name, state.output)),
            frozenset(value.name for value in (*manifest.inputs, *manifest.outputs)),
        )

    def kind(self, name: str) -> Kind:
        """Return what a tensor of this plain name is."""
        if name in self.weights:
            return "weight"
        if name in self.states:
            return "state"
        if name in self.inputs:
            return "input"
        return "constant" if name == "freqs" or name.startswith("rope.") else "activation"

    def role(self, inputs: Iterable[Tensor]) -> str:
        """Return the module of the first weight: `attn.wq_a`, `hc_attn` for `hc_attn_fn`, or nothing."""
        for tensor in inputs:
            name = plain(tensor.name)
            if name in self.weights:
                return name.rpartition(".")[0] or re.sub(r"_(fn|base|scale)$", "", name)
        return ""


def part(node: NodeFacts, role: str, block: str) -> str:
    """Return the part of the model that an op belongs to; `block` is a layer, "embed" or "head"."""
    if not block.startswith("layers."):
        return "embedding and head"
    for prefix, found in (("attn.indexer", "indexer"), ("attn.compressor", "compressor")):
        if role.startswith(prefix):
            return found
    return next((found for fragment, found in _OPS if fragment in f"{node.op}__"), "other")
