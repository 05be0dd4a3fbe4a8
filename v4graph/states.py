"""The state tensors of each layer kind, as the manifest lists them. Source: spec section 2.7."""

from __future__ import annotations

import math
from dataclasses import replace

from v4graph.config import Layer, ModelConfig
from v4graph.manifest import FloatType, State

CAPACITY_MULTIPLE = 128


def round_capacity(config: ModelConfig, max_seq_len: int) -> int:
    """Round a length in tokens up to a multiple of 128 and of every compress ratio."""
    multiple = math.lcm(CAPACITY_MULTIPLE, *(layer.ratio for layer in config.layers if layer.ratio))
    return -(-max_seq_len // multiple) * multiple


def layer_states(config: ModelConfig, layer: Layer, slack: int, dtype: FloatType) -> tuple[State, ...]:
    """Return the states of one layer, with names relative to the layer and no layer index."""

    def ring(name: str, rows: int, width: int, kind: FloatType = "float32") -> State:
        return State(name, name, (), kind, ("B", rows, width), "ring", layer.ratio)

    def cache(name: str, width: int) -> State:
        return State(name, name, (), dtype, ("B", f"C{layer.ratio}", width), "append", layer.ratio)

    states = [ring("window", config.sliding_window + slack, config.head_dim, dtype)]
    if layer.attention == "window":
        return tuple(states)
    overlap = layer.attention == "csa"
    parts = 2 if overlap else 1
    tail = parts * layer.ratio + slack
    states += [
        cache("compressed", config.head_dim),
        ring("tail_kv", tail, parts * config.head_dim),
        ring("tail_gate", tail, parts * config.head_dim),
    ]
    if overlap:
        states += [
            cache("index_keys", config.index_head_dim),
            ring("index_tail_kv", tail, 2 * config.index_head_dim),
            ring("index_tail_gate", tail, 2 * config.index_head_dim),
        ]
    return tuple(states)


def model_states(config: ModelConfig, slack: int, dtype: FloatType) -> tuple[State, ...]:
    """Return the states of the whole model by pattern: equal states of several layers are one entry."""
    layers_of: dict[State, list[int]] = {}
    for i, layer in enumerate(config.layers):
        for state in layer_states(config, layer, slack, dtype):
            layers_of.setdefault(state, []).append(i)
    return tuple(
        replace(
            state, name=f"state.{{i}}.{state.name}", output=f"next.{{i}}.{state.name}", layers=tuple(layers)
        )
        for state, layers in layers_of.items()
    )
