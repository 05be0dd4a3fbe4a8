"""Each layer kind, the embedding and the head as ONNX functions, traced once on fake tensors.

Tracing sees weights and states as arguments, so its cost depends neither on depth nor on weights.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import Tensor

from v4graph.config import Layer, ModelConfig
from v4graph.manifest import Binding, State
from v4graph.states import layer_states
from v4graph_export import model
from v4graph_export.bindings import head_bindings, layer_bindings
from v4graph_export.flavour import Flavour
from v4graph_export.functions import FakeInput, to_function, trace
from v4graph_export.registration import TORCH_DTYPES

# Example sizes of the symbolic axes: any that keep every derived size at 2 or more.
_BATCH, _TOKENS, _ROWS = 2, 389, 533
STREAMS = 4
RUNTIME_INPUTS = ("input_ids", "start_pos", "num_tokens")


def layer_function(config: ModelConfig, layer: Layer, flavour: Flavour, slack: int) -> ir.Function:
    """Trace one layer kind.

    Inputs: streams, input_ids, start_pos, num_tokens, freqs, then the weights of `layer_bindings`
    and the states of `layer_states`. Outputs: streams, then the states' next values.
    """
    bindings = layer_bindings(config, layer, flavour)
    states = layer_states(config, layer, slack, flavour.dtype)
    decoder = model.DecoderLayer(config, layer, flavour)

    def call(x: Tensor, tokens: Tensor, start: Tensor, num: Tensor, freqs: Tensor, *flat: Tensor) -> Any:
        weights = dict(zip((b.input for b in bindings), flat, strict=False))
        old = dict(zip((s.name for s in states), flat[len(bindings) :], strict=True))
        y, following = decoder(x, model.Chunk(tokens, start, num, freqs), weights, old)
        return (y, *(following[s.name] for s in states))

    inputs = [
        FakeInput("x", flavour.dtype, (_BATCH, _TOKENS, STREAMS, config.hidden_size), (0, 1)),
        *_runtime_inputs(),
        FakeInput("freqs", "float32", (config.qk_rope_head_dim // 2,), ()),
        *(_weight(binding) for binding in bindings),
        *(_state(state) for state in states),
    ]
    outputs = ["y", *(f"next_{state.name}" for state in states)]
    return to_function(trace(call, inputs, outputs), f"V4Layer_{layer.kind}")


def embed_function(config: ModelConfig, flavour: Flavour) -> ir.Function:
    """Trace the embedding: input_ids, embed.weight -> streams."""
    table = head_bindings(config, flavour)[0]
    inputs = [_runtime_inputs()[0], _weight(table)]

    def call(tokens: Tensor, rows: Tensor) -> Tensor:
        return model.embed(tokens, rows, TORCH_DTYPES[flavour.dtype])

    return to_function(trace(call, inputs, ["x"]), "V4Embed")


def head_function(config: ModelConfig, flavour: Flavour, *, all_logits: bool) -> ir.Function:
    """Trace the head: streams, num_tokens, then the weights of `head_bindings` but the embedding."""
    bindings = head_bindings(config, flavour)[1:]

    def call(x: Tensor, num: Tensor, *flat: Tensor) -> Tensor:
        weights = dict(zip((b.input for b in bindings), flat, strict=True))
        return model.head(config, x, num, weights, all_logits=all_logits)

    streams = FakeInput("x", flavour.dtype, (_BATCH, _TOKENS, STREAMS, config.hidden_size), (0, 1))
    inputs = [streams, _runtime_inputs()[2], *(_weight(binding) for binding in bindings)]
    return to_function(trace(call, inputs, ["logits"]), "V4Head")


def _runtime_inputs() -> tuple[FakeInput, FakeInput, FakeInput]:
    tokens, start, num = RUNTIME_INPUTS
    return (
        FakeInput(tokens, "int64", (_BATCH, _TOKENS), (0, 1)),
        FakeInput(start, "int32", (_BATCH,), (0,)),
        FakeInput(num, "int32", (_BATCH,), (0,)),
    )


def _weight(binding: Binding) -> FakeInput:
    return FakeInput(binding.input, binding.dtype, binding.shape, ())


def _state(state: State) -> FakeInput:
    _, rows, width = state.shape
    size = rows if isinstance(rows, int) else _ROWS
    assert isinstance(width, int)
    symbolic = (0,) if isinstance(rows, int) else (0, 1)
    return FakeInput(state.name, state.dtype, (_BATCH, size, width), symbolic)
