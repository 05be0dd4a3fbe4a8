"""The op calls that are counted without a graph are those that the exported model makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from v4graph.config import Layer, ModelConfig
from v4graph.launch import PLANS
from v4graph.launch.calls import Call, Chunk, head_calls, layer_calls
from v4graph.launch.cost import COSTS
from v4graph.states import layer_states
from v4graph_export import model
from v4graph_export.bindings import head_bindings, layer_bindings
from v4graph_export.flavour import Flavour

CHUNK = Chunk(batch=2, tokens=5, capacity=1024)
KINDS = [
    (name, kind)
    for name in ("nano", "flash", "pro")
    for kind in dict.fromkeys(layer.kind for layer in ModelConfig.load(name).layers)
]
Recorded = list[tuple[str, list[tuple[int, ...]], list[str], dict[str, Any]]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    calls: Recorded = []
    original = model.call

    def record(name: str, *inputs: torch.Tensor, **attributes: Any) -> Any:
        dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in inputs]
        calls.append((name, [tuple(tensor.shape) for tensor in inputs], dtypes, attributes))
        return original(name, *inputs, **attributes)

    monkeypatch.setattr(model, "call", record)
    return calls


def meta(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def seen(calls: list[Call]) -> Recorded:
    return [(call.op, call.shapes, call.dtypes, dict(call.attributes)) for call in calls]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_layer_makes_these_calls(name: str, kind: str, recorded: Recorded) -> None:
    config = ModelConfig.load(name)
    layer: Layer = next(layer for layer in config.layers if layer.kind == kind)
    flavour = Flavour("v4", "bfloat16", config.weight_format)
    B, S = CHUNK.batch, CHUNK.tokens
    weights = {b.input: meta(b.shape, b.dtype) for b in layer_bindings(config, layer, flavour)}
    states = {
        s.name: meta(
            (B, s.shape[1] if isinstance(s.shape[1], int) else CHUNK.capacity // layer.ratio, s.shape[2]),
            s.dtype,
        )
        for s in layer_states(config, layer, 8, "bfloat16")
    }
    integers = (meta((B, S), "int64"), meta((B,), "int32"), meta((B,), "int32"))
    chunk = model.Chunk(*integers, meta((config.qk_rope_head_dim // 2,), "float32"))
    x = meta((B, S, 4, config.hidden_size), "bfloat16")
    model.DecoderLayer(config, layer, flavour)(x, chunk, weights, states)
    assert seen(layer_calls(config, layer, CHUNK)) == recorded


@pytest.mark.parametrize("name", ["nano", "flash", "pro"])
def test_the_head_makes_these_calls(name: str, recorded: Recorded) -> None:
    config = ModelConfig.load(name)
    flavour = Flavour("v4", "bfloat16", config.weight_format)
    weights = {b.input: meta(b.shape, b.dtype) for b in head_bindings(config, flavour)}
    x = meta((CHUNK.batch, 1, 4, config.hidden_size), "bfloat16")
    model.head(config, x, meta((CHUNK.batch,), "int32"), weights, all_logits=True)
    assert seen(head_calls(config, CHUNK)) == recorded


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_every_call_has_a_cost_and_launches(name: str, kind: str) -> None:
    config = ModelConfig.load(name)
    layer = next(layer for layer in config.layers if layer.kind == kind)
    for call in [*layer_calls(config, layer, CHUNK), *head_calls(config, CHUNK)]:
        nbytes, flops = COSTS[call.op].of(call, context=380)
        assert nbytes > 0
        assert flops > 0
        assert call.launches(PLANS).launches
