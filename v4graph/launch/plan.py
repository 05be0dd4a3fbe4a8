"""`LaunchPlan`: what an op launches, as data: kernels, grids, shared memory, arguments, workspace.

A plan's fields are names and integer expressions (`v4graph.launch.expression`) over the symbols of the
op's ports, its int attributes and `<port>_bytes` (item size of an input). Evaluating it for given shapes
gives a flat list of launches; no device is needed, and the same shapes give the same launches on every GPU,
so results do not depend on the machine. `LaunchPlan.as_json` is what a host without Python reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from v4graph.errors import EngineError
from v4graph.launch.expression import evaluate, names
from v4graph.ops import OpSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int32": 4, "int64": 8}
ALIGNMENT = 256


@dataclass(frozen=True)
class Step:
    """One kernel launch.

    Attributes:
        kernel: `unit.entry_point`.
        grid: Expressions of the blocks in x, y, z. A step with an empty grid is left out.
        block: Threads of a block, a multiple of 32.
        args: In the kernel's order: a port or workspace buffer (its address), a float attribute
            (float32), or an integer expression (int32).
        shared: Expression of the dynamic shared memory in bytes.
        when: Expression; the step is left out where it is 0.
        repeat: How often the step runs in a row; `i` counts up in its other expressions. Consecutive steps
            with the same `group` repeat together.
    """

    kernel: str
    grid: tuple[str, str, str]
    block: int
    args: tuple[str, ...]
    shared: str = "0"
    when: str = "1"
    repeat: str = "1"
    group: str = ""


@dataclass(frozen=True)
class LaunchPlan:
    """The launches of one op.

    Attributes:
        op: Name of the op.
        steps: In launch order; a step sees what the steps before it wrote.
        lets: Name to expression, evaluated in order, each seeing those before it.
        workspace: Buffer name to bytes (expressions). The sum must not shrink when B, S or a
            capacity grows: it is asked for once, at the largest shapes.
        needs: Condition (expression) to the sentence that says what is wrong where it is 0.
        choices: String attribute to its values; in expressions it is the index of its value.
    """

    op: str
    steps: tuple[Step, ...]
    lets: Mapping[str, str] = field(default_factory=dict)
    workspace: Mapping[str, str] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON data, expressions unevaluated."""
        return asdict(self)


@dataclass(frozen=True)
class Argument:
    """A kernel argument: an address (input or output by index, workspace by byte offset) or a number."""

    kind: Literal["input", "output", "workspace", "int32", "float32"]
    value: int | float


@dataclass(frozen=True)
class Launch:
    """One launch with numbers in it; `shared` is in bytes."""

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Launches:
    """A plan evaluated for one call: the launches in order and the bytes of workspace they need."""

    launches: tuple[Launch, ...]
    workspace: int


def symbols_of(
    plan: LaunchPlan,
    spec: OpSpec,
    attributes: Mapping[str, Any],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str],
) -> dict[str, int]:
    """Return the values of every name that the plan's expressions may use."""
    named = {port.name: tuple(shape) for port, shape in zip(spec.inputs, shapes, strict=True)}
    symbols = {
        **{name: value for name, value in attributes.items() if spec.attributes[name] is int},
        **{f"{p.name}_bytes": ITEM_BYTES[dtype] for p, dtype in zip(spec.inputs, dtypes, strict=True)},
        **spec.bind_shapes(named),
    }
    for name, values in plan.choices.items():
        symbols[name] = values.index(attributes[name])
    for name, text in plan.lets.items():
        symbols[name] = evaluate(text, symbols)
    return symbols


def evaluate_plan(
    plan: LaunchPlan,
    spec: OpSpec,
    attributes: Mapping[str, Any],
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[str],
) -> Launches:
    """Return the launches of one call; `shapes` and `dtypes` are those of the inputs.

    Raises:
        EngineError: the kernels do not cover these shapes; the text says which limit is crossed.
    """
    symbols = symbols_of(plan, spec, attributes, shapes, dtypes)
    for condition, sentence in plan.needs.items():
        if not evaluate(condition, symbols):
            found = ", ".join(f"{name} = {symbols[name]}" for name in sorted(names(condition)))
            raise EngineError(f"{spec.name}: {sentence} ({found}).")
    offsets, total = {}, 0
    for name, text in plan.workspace.items():
        offsets[name] = total
        total += _aligned(max(0, evaluate(text, symbols)))
    inputs = {port.name: i for i, port in enumerate(spec.inputs)}
    outputs = {port.name: i for i, port in enumerate(spec.outputs)}

    def argument(text: str, here: Mapping[str, int]) -> Argument:
        if text in inputs:
            return Argument("input", inputs[text])
        if text in outputs:
            return Argument("output", outputs[text])
        if text in offsets:
            return Argument("workspace", offsets[text])
        if spec.attributes.get(text) is float:
            return Argument("float32", float(attributes[text]))
        return Argument("int32", _int32(spec, evaluate(text, here)))

    launches: list[Launch] = []
    for group in _groups(plan.steps):
        for i in range(evaluate(group[0].repeat, symbols)):
            here = {**symbols, "i": i}
            for step in group:
                if not evaluate(step.when, here):
                    continue
                x, y, z = (_int32(spec, evaluate(text, here)) for text in step.grid)
                if x * y * z:
                    arguments = tuple(argument(text, here) for text in step.args)
                    shared = evaluate(step.shared, here)
                    launches.append(Launch(step.kernel, (x, y, z), step.block, shared, arguments))
    return Launches(tuple(launches), total)


def _int32(spec: OpSpec, value: int) -> int:
    if abs(value) >= 2**31:
        raise EngineError(
            f"{spec.name}: one call has too many tokens for its kernels, whose sizes are int32; lower "
            "--max-batch-size or --max-input-len."
        )
    return value


def _groups(steps: Sequence[Step]) -> list[list[Step]]:
    groups: list[list[Step]] = []
    for step in steps:
        if groups and step.group and groups[-1][0].group == step.group:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / ALIGNMENT) * ALIGNMENT
