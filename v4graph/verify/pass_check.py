"""Prove a graph pass on the spot: the graph before it and after it give the same numbers.

One layer of each kind between the embedding and the head, at small shapes, on random inputs, in onnxruntime
with the ops' bodies; bf16 graphs as their float32 twins. Where a rounding moved a top-k, both run again with
selections forced, and what the selections are made from is compared instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from v4graph.errors import PassError
from v4graph.passes.facts import LAYER_PREFIX, custom_nodes, plain_name
from v4graph.passes.inline_layers import InlineLayers
from v4graph.passes.keep_layers import KeepLayers
from v4graph.passes.run import Pass, PassReport, apply
from v4graph.verify.graph_runner import fed, open_unoptimized
from v4graph.verify.random_inputs import Array, Sizes, random_inputs, widened
from v4graph.verify.selections import TOPK, force_selections
from v4graph.verify.twin import float32_twin

Arrays = dict[str, Array]


@dataclass
class PassChecker:
    """Checks each pass of a run; give `watch` and `done` to `run_passes`.

    Attributes:
        folder: Where the inputs of a differing node are saved.
        sizes: Slots, tokens and capacity of the runs.
        seed: Of the random weights and states.
    """

    model: ir.Model
    folder: Path
    sizes: tuple[Sizes, ...] = (Sizes(), Sizes(start=(131,), num=(1,), tokens=1))
    seed: int = 0
    checked: dict[str, str] = field(default_factory=dict)
    _before: ir.Model | None = None
    _pass: Pass | None = None

    def watch(self, one: Pass, _number: int) -> None:
        """Keep a pass and the graph as it is before it."""
        self._pass, self._before = one, copy(self.model)

    def done(self, report: PassReport) -> None:
        """Compare that graph, cut to one layer of each kind, with what the pass makes of it.

        Raises:
            PassError: the numbers differ; names the pass and the first differing node.
        """
        if not report.modified:
            self.checked[report.name] = "nothing changed"
            return
        assert self._before is not None
        assert self._pass is not None
        layers = one_of_each_kind(self._before)
        if layers:
            apply(KeepLayers(layers), self._before)
        after = copy(self._before)
        apply(self._pass, after)
        self.checked[report.name] = self.compare(report.name, self._before, after)

    def compare(self, name: str, before: ir.Model, after: ir.Model) -> str:
        """Compare two graphs (both are changed on the way); return in words how far they agree.

        Raises:
            PassError: they do not.
        """
        for model in (before, after):
            float32_twin(model)
        rtol, atol, flips = _tolerance(before)
        close = Closeness(rtol, atol, flips)
        ports = model_inputs(before, after)
        largest = 0.0
        firsts, seconds = (_prepared(model) for model in (before, after))
        for sizes in self.sizes:
            inputs = random_inputs(ports, sizes, self.seed)
            first, second = firsts(inputs), seconds(inputs)
            if not _agree(name, first, second, close):
                return self._inside(name, before, after, sizes, close)
            largest = max(
                largest, *(close.largest(second[key], first[key]) for key in first if key in second)
            )
        return "equal" if largest == 0 else f"within {largest:.1e}"

    def _inside(self, name: str, before: ir.Model, after: ir.Model, sizes: Sizes, close: Closeness) -> str:
        """Compare value by value; with forced selections, in case only they moved."""
        for model in (before, after):
            apply(InlineLayers(), model)
        inputs = random_inputs(model_inputs(before, after), sizes, self.seed)
        forced = force_selections(before, sizes, self.seed)
        force_selections(after, sizes, self.seed)
        for model in (before, after):
            _show_all(model)
        given = {**inputs, **forced}
        first, second = run(before, given), run(after, given)
        for node in after.graph:
            agree = close
            if plain_name(node.op_type) in TOPK and not _same_inputs(node, first, second):
                # What it selects from has moved within the tolerance, so a few selections may.
                agree = Closeness(close.rtol, close.atol, 0.1, ordered=False)
            for value in node.outputs:
                key = value.name or ""
                if key in first and key in second and not agree(second[key], first[key]):
                    largest = close.largest(second[key], first[key])
                    found = f"'{key}' {largest:.3g} away from"
                    raise self._error(name, node, found, {**given, **second})
        moved = [key for key in first if key in second]
        if not moved:
            raise PassError(
                f"pass {name}: the logits differ and no value inside has the same name on both sides."
            )
        return "equal but for selections that a rounding moved"

    def _error(self, name: str, node: ir.Node, found: str, values: Mapping[str, Array]) -> PassError:
        given = {
            str(value.name): widened(values[str(value.name)])
            for value in node.inputs
            if value is not None and str(value.name) in values
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        place = (node.name or node.op_type).replace("/", ".")
        path = self.folder / f"{name}-{place}.npz"
        arrays: dict[str, Any] = given
        np.savez_compressed(path, **arrays)
        return PassError(
            f"pass {name} changes the numbers: {node.name or plain_name(node.op_type)} gives {found} "
            f"the graph before it, more than the ops' tolerance; its inputs are in {path}. Correct the "
            f"pass, or leave it out with --skip {name}."
        )


@dataclass(frozen=True)
class Closeness:
    """Whether arrays agree: a share `flips` of the elements may be off by a quantiser's step."""

    rtol: float
    atol: float
    flips: float
    ordered: bool = True

    def __call__(self, got: Array, want: Array) -> bool:
        """Compare; NaN equals nothing."""
        if got.shape != want.shape:
            return False
        if not np.issubdtype(want.dtype, np.floating):
            return bool((got != want).mean() <= (0 if self.ordered else 0.1))
        difference = np.abs(got.astype(np.float64) - want)
        outside = ~(difference <= self.atol + self.rtol * np.abs(want))
        return bool(outside.mean() <= self.flips and not (difference > 0.125 * np.abs(want).max()).any())

    def largest(self, got: Array, want: Array) -> float:
        """Return the largest difference; infinity if the shapes differ."""
        if got.shape != want.shape:
            return float("inf")
        return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0.0))


def _agree(name: str, first: Arrays, second: Arrays, close: Closeness) -> bool:
    """Whether the outputs that both graphs have agree; states may have gone.

    Raises:
        PassError: another output has gone.
    """
    gone = [key for key in first if key not in second and not key.startswith("next.")]
    if gone:
        raise PassError(f"pass {name}: the graph after it lacks the outputs {', '.join(gone)}.")
    return all(close(second[key], first[key]) for key in first if key in second)


def copy(model: ir.Model) -> ir.Model:
    """Return a model that shares nothing with `model`; weights that lie in other files become inputs."""
    outside = [
        name
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    other = ir.from_proto(ir.to_proto(model))
    for name in outside:
        value = other.graph.initializers.pop(name)
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        value.const_value = None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.numpy().shape)
        other.graph.inputs.append(value)
    return other


def model_inputs(*models: ir.Model) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Return dtype and shape of every input of some graphs."""
    ports = {}
    for model in models:
        for value in model.graph.inputs:
            assert value.name
            assert value.dtype is not None
            assert value.shape is not None
            shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
            ports[value.name] = (value.dtype.numpy().name, shape)
    return ports


def one_of_each_kind(model: ir.Model) -> list[int]:
    """Return the first layer of every kind."""
    first: dict[str, int] = {}
    for node in model.graph:
        if node.op_type.startswith(LAYER_PREFIX) and node.name:
            first.setdefault(node.op_type, int(node.name.removeprefix("layers.")))
    return sorted(first.values())


def _tolerance(model: ir.Model) -> tuple[float, float, float]:
    """The loosest tolerance of the ops in the graph."""
    flat = copy(model)
    apply(InlineLayers(), flat)
    specs = [spec for _, spec in custom_nodes(flat)]
    rtol = max((spec.tolerance["float32"][0] for spec in specs), default=1e-4)
    atol = max((spec.tolerance["float32"][1] for spec in specs), default=1e-4)
    return rtol, atol, max((spec.flips for spec in specs), default=0.0)


def _same_inputs(node: ir.Node, first: Arrays, second: Arrays) -> bool:
    """Whether a node read exactly the same on both sides."""
    names = [value.name or "" for value in node.inputs if value is not None]
    return all(
        np.array_equal(first[name], second[name]) for name in names if name in first and name in second
    )


def _show_all(model: ir.Model) -> None:
    """Make every custom op's outputs outputs of the graph."""
    for node, _ in list(custom_nodes(model)):
        for value in node.outputs:
            if not value.is_graph_output():
                model.graph.outputs.append(value)


def run(model: ir.Model, inputs: Mapping[str, Array]) -> Arrays:
    """Run a model in onnxruntime on a CPU, optimisations off, and return its outputs by name.

    Raises:
        EngineError: onnxruntime refuses the model.
    """
    return _prepared(model)(inputs)


def _prepared(model: ir.Model) -> Callable[[Mapping[str, Array]], Arrays]:
    """Load a model and return what runs it."""
    session = open_unoptimized(model)
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}

    def call(inputs: Mapping[str, Array]) -> Arrays:
        found = session.run(names, fed({key: array for key, array in inputs.items() if key in wanted}))
        return dict(zip(names, found, strict=True))

    return call
