"""The model graph: embedding, one call per layer, head; weights and states are graph inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from v4graph.config import Layer, ModelConfig
from v4graph.manifest import Binding, State, TensorContract
from v4graph.ops import DOMAIN
from v4graph.passes.run import Pass, apply
from v4graph.states import layer_states
from v4graph_export.bindings import LAYER_PREFIX, head_bindings, layer_bindings
from v4graph_export.bodies import attach_bodies
from v4graph_export.flavour import Flavour
from v4graph_export.functions import OPSETS
from v4graph_export.layers import embed_function, head_function, layer_function

IR_VERSION = 10
Progress = Callable[[str, int, int], None]

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "bfloat16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the graph: the model, its flavour, and the state and output options."""

    config: ModelConfig
    flavour: Flavour
    slack: int
    all_logits: bool

    @property
    def inputs(self) -> tuple[TensorContract, ...]:
        """The inputs of each call, weights and states aside."""
        tokens = TensorContract("input_ids", "int64", ("B", "S"))
        return tokens, *(TensorContract(name, "int32", ("B",)) for name in ("start_pos", "num_tokens"))

    @property
    def outputs(self) -> tuple[TensorContract, ...]:
        """The outputs of each call, states aside."""
        shape = ("B", "S", self.config.vocab_size) if self.all_logits else ("B", self.config.vocab_size)
        return (TensorContract("logits", "float32", shape),)


def layer_functions(recipe: Recipe, progress: Progress) -> dict[str, ir.Function]:
    """Trace each layer kind in use once; keys are layer kinds."""
    kinds = {layer.kind: layer for layer in recipe.config.layers}
    functions = {}
    for done, (kind, layer) in enumerate(kinds.items()):
        progress(f"trace {kind}", done, len(kinds) + 2)
        functions[kind] = layer_function(recipe.config, layer, recipe.flavour, recipe.slack)
    return functions


def compose(recipe: Recipe, progress: Progress, passes: Sequence[Pass] = ()) -> ir.Model:
    """Build the whole model, run `passes` on it, and add the body of every custom op it uses."""
    layers = layer_functions(recipe, progress)
    progress("trace the head", len(layers), len(layers) + 2)
    functions = [
        embed_function(recipe.config, recipe.flavour),
        *layers.values(),
        head_function(recipe.config, recipe.flavour, all_logits=recipe.all_logits),
    ]
    progress("compose", len(layers) + 1, len(layers) + 2)
    graph = _Composer(recipe).build()
    model = ir.Model(graph, ir_version=IR_VERSION, functions=functions, producer_name="v4graph")
    # Before the bodies are there: they need no passes, and fused ops bring their own.
    for one in passes:
        apply(one, model)
    bodies = attach_bodies(list(model.functions.values()), recipe.flavour.dtype, recipe.flavour.scale_dtype)
    model.functions.update({body.identifier(): body for body in bodies})
    progress("done", len(layers) + 2, len(layers) + 2)
    return model


class _Composer:
    """Builds the top-level graph; holds its inputs and nodes while they grow."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._nodes: list[ir.Node] = []
        self._weights: list[ir.Value] = []
        self._states: list[ir.Value] = []
        self._next: list[ir.Value] = []
        self._initializers = {
            name: ir.Value(name=name, const_value=ir.tensor(rope.frequencies(), name=name))
            for name, rope in (
                ("rope.main.freqs", recipe.config.rope),
                ("rope.compress.freqs", recipe.config.compress_rope),
            )
        }

    def build(self) -> ir.Graph:
        recipe = self._recipe
        runtime = [_value(c.name, c.dtype, c.shape) for c in recipe.inputs]
        tokens, _, num = runtime
        table, *rest = [self._weight(b, b.input) for b in head_bindings(recipe.config, recipe.flavour)]
        x = self._call("V4Embed", "embed", [tokens, table], ["streams"])[0]
        for i, layer in enumerate(recipe.config.layers):
            x = self._layer(i, layer, x, runtime)
        (logits,) = self._call("V4Head", "head", [x, num, *rest], ["logits"])
        contract = recipe.outputs[0]
        logits.type, logits.shape = ir.TensorType(_DTYPES[contract.dtype]), ir.Shape(contract.shape)
        return ir.Graph(
            [*runtime, *self._states, *self._weights],
            [logits, *self._next],
            nodes=self._nodes,
            initializers=[v for v in self._initializers.values() if v.uses()],
            opset_imports=dict(OPSETS),
            name="deepseek_v4",
        )

    def _layer(self, i: int, layer: Layer, x: ir.Value, runtime: list[ir.Value]) -> ir.Value:
        recipe = self._recipe
        bindings = layer_bindings(recipe.config, layer, recipe.flavour)
        weights = [self._weight(b, LAYER_PREFIX.replace("{i}", str(i)) + b.input) for b in bindings]
        contracts = layer_states(recipe.config, layer, recipe.slack, recipe.flavour.dtype)
        states = [_state(f"state.{i}.{s.name}", s) for s in contracts]
        freqs = self._initializers["rope.compress.freqs" if layer.ratio else "rope.main.freqs"]
        names = [f"layers.{i}.streams", *(f"next.{i}.{s.name}" for s in contracts)]
        y, *following = self._call(
            f"V4Layer_{layer.kind}", f"layers.{i}", [x, *runtime, freqs, *weights, *states], names
        )
        for value, contract in zip(following, contracts, strict=True):
            value.type, value.shape = ir.TensorType(_DTYPES[contract.dtype]), ir.Shape(contract.shape)
        self._states += states
        self._next += following
        return y

    def _weight(self, binding: Binding, name: str) -> ir.Value:
        value = _value(name, binding.dtype, binding.shape)
        self._weights.append(value)
        return value

    def _call(self, function: str, name: str, inputs: list[ir.Value], outputs: list[str]) -> list[ir.Value]:
        node = ir.Node(DOMAIN, function, inputs, num_outputs=len(outputs), name=name)
        for value, output in zip(node.outputs, outputs, strict=True):
            value.name = output
        self._nodes.append(node)
        return list(node.outputs)


def _value(name: str, dtype: str, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(_DTYPES[dtype]), shape=ir.Shape(shape))


def _state(name: str, state: State) -> ir.Value:
    return _value(name, state.dtype, state.shape)
