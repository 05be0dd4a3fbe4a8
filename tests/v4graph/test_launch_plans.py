"""Launch plans are data: a small language, launches with numbers, and bounds that hold at any shape."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from v4graph.config import ModelConfig
from v4graph.errors import EngineError
from v4graph.launch import ALL_PLANS, PLANS, Argument, Launch, LaunchPlan, Step, evaluate_plan
from v4graph.launch.calls import Call, Chunk, head_calls, layer_calls
from v4graph.launch.expression import FUNCTIONS, evaluate, names
from v4graph.launch.fused_calls import fused_layer_calls
from v4graph.ops import OPS_BY_NAME
from v4graph.ops.spec import OpSpec
from v4graph_plugins.catalogue import PLUGIN_OPS
from v4graph_plugins.kernel_gates import SHARED_LIMITS

MODELS = ("nano", "flash", "pro")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*B + 3", 13),
        ("cdiv(B, 2)", 3),
        ("B // 2 - B % 2", 1),
        ("min(B, 3) + max(B, 3)", 8),
        ("where(B > 4 and not B == 6, 1, 2)", 1),
        ("B <= 5 or missing", 1),
        ("-B", -5),
    ],
)
def test_expressions_are_evaluated_to_ints(text: str, value: int) -> None:
    assert evaluate(text, {"B": 5}) == value


@pytest.mark.parametrize(
    "text", ["B / 2", "B.real", "[B]", "print(B)", "B if B else 1", "'B'", "2.5", "f'{B}'"]
)
def test_what_is_not_in_the_language_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="launch expression"):
        evaluate(text, {"B": 5})


def test_a_symbol_without_a_value_is_named() -> None:
    with pytest.raises(ValueError, match="launch expression 'B \\+ X': name 'X' is not defined"):
        evaluate("B + X", {"B": 5})


TOY = LaunchPlan(
    op="V4RmsNorm",
    lets={"T": "B*S", "twice": "2*T"},
    workspace={"first": "T*3", "second": "100"},
    needs={"D % 8 == 0": "D must be a multiple of 8"},
    steps=(
        Step("norm.a", grid=("T", "1", "1"), block=32, args=("x", "y", "second", "twice", "eps")),
        Step("norm.b", grid=("1", "1", "1"), block=32, args=(), when="T > 100"),
        Step("norm.c", grid=("i + 1", "1", "1"), block=32, args=("i",), repeat="2", group="g"),
        Step(
            "norm.d", grid=("1 - i", "1", "1"), block=32, args=("first",), repeat="2", group="g", shared="8*D"
        ),
    ),
)


def toy(width: int = 16) -> tuple[tuple[Launch, ...], int]:
    spec = OPS_BY_NAME["V4RmsNorm"]
    found = evaluate_plan(TOY, spec, {"eps": 0.5}, [(2, 3, width), (width,)], ["bfloat16", "bfloat16"])
    return found.launches, found.workspace


def test_a_plan_becomes_launches_with_numbers() -> None:
    launches, workspace = toy()
    assert workspace == 512
    assert [launch.kernel for launch in launches] == ["norm.a", "norm.c", "norm.d", "norm.c"]
    assert launches[0] == Launch(
        "norm.a",
        (6, 1, 1),
        32,
        0,
        (
            Argument("input", 0),
            Argument("output", 0),
            Argument("workspace", 256),
            Argument("int32", 12),
            Argument("float32", 0.5),
        ),
    )
    assert [launch.grid[0] for launch in launches[1:]] == [1, 1, 2]
    assert launches[2].shared == 128


def test_shapes_that_no_kernel_takes_are_refused_in_a_sentence() -> None:
    with pytest.raises(EngineError, match=r"^V4RmsNorm: D must be a multiple of 8 \(D = 12\)\.$"):
        toy(12)


def test_every_plugin_has_a_plan() -> None:
    assert set(PLANS) == {spec.name for spec in PLUGIN_OPS}
    assert len(PLANS) == len(ALL_PLANS)


def known_names(plan: LaunchPlan, spec: OpSpec) -> set[str]:
    symbols = {dim for port in spec.inputs for dim in port.dims if dim.isidentifier()}
    integers = {name for name, kind in spec.attributes.items() if kind is int}
    return symbols | integers | set(plan.choices) | {f"{port.name}_bytes" for port in spec.inputs} | {"i"}


@pytest.mark.parametrize("plan", ALL_PLANS, ids=lambda plan: plan.op)
def test_a_plan_uses_only_names_that_it_has(plan: LaunchPlan) -> None:
    spec = OPS_BY_NAME[plan.op]
    known = known_names(plan, spec)
    for name, text in plan.lets.items():
        assert names(text) <= known, (name, text)
        known.add(name)
    tensors = {port.name for port in (*spec.inputs, *spec.outputs)} | set(plan.workspace)
    floats = {name for name, kind in spec.attributes.items() if kind is float}
    for text in (*plan.workspace.values(), *plan.needs):
        assert names(text) <= known, text
    for step in plan.steps:
        for text in (*step.grid, step.shared, step.when, step.repeat):
            assert names(text) <= known, (step.kernel, text)
        for text in step.args:
            assert text in tensors | floats or names(text) <= known, (step.kernel, text)
        assert step.block % 32 == 0
    assert not tensors & set(plan.workspace) - set(plan.workspace)
    assert not set(plan.lets) & set(FUNCTIONS)


@pytest.mark.parametrize("plan", ALL_PLANS, ids=lambda plan: plan.op)
def test_a_plan_survives_json(plan: LaunchPlan) -> None:
    raw = json.loads(json.dumps(plan.as_json()))
    raw["steps"] = tuple(
        Step(**{**step, "grid": tuple(step["grid"]), "args": tuple(step["args"])}) for step in raw["steps"]
    )
    raw["choices"] = {name: tuple(values) for name, values in raw["choices"].items()}
    assert LaunchPlan(**raw) == plan


def model_calls(model: str, chunk: Chunk) -> list[Call]:
    config = ModelConfig.load(model)
    kinds = {layer.kind: layer for layer in config.layers}.values()
    layers = [
        call
        for layer in kinds
        for call in (*layer_calls(config, layer, chunk), *fused_layer_calls(config, layer, chunk))
    ]
    return layers + head_calls(config, chunk)


@given(
    model=st.sampled_from(MODELS),
    small=st.tuples(st.integers(1, 64), st.integers(1, 300), st.integers(1, 40)),
    more=st.tuples(st.integers(0, 64), st.integers(0, 3000), st.integers(0, 2000)),
)
def test_workspace_never_shrinks_when_a_shape_grows(
    model: str, small: tuple[int, int, int], more: tuple[int, int, int]
) -> None:
    """TensorRT asks once, at the largest shapes."""
    assume((small[0] + more[0]) * (small[1] + more[1]) <= 65536)  # more is refused: sizes are int32
    least = Chunk(small[0], small[1], 128 * small[2])
    most = Chunk(small[0] + more[0], small[1] + more[1], 128 * (small[2] + more[2]))
    for one, other in zip(model_calls(model, least), model_calls(model, most), strict=True):
        assert one.launches(PLANS).workspace <= other.launches(PLANS).workspace, (one.op, least, most)


@given(
    model=st.sampled_from(MODELS),
    batch=st.integers(1, 64),
    tokens=st.sampled_from([1, 2, 7, 8, 9, 32, 33, 64, 65, 129, 2048, 8192]),
    blocks=st.sampled_from([1, 8, 1024, 8192]),
)
def test_launches_stay_within_every_gpus_limits(model: str, batch: int, tokens: int, blocks: int) -> None:
    batch = min(batch, 65536 // tokens)
    for call in model_calls(model, Chunk(batch, tokens, 128 * blocks)):
        for launch in call.launches(PLANS).launches:
            assert launch.grid[0] < 2**31, launch
            assert max(launch.grid[1:]) <= 65535, launch
            assert launch.shared <= min(SHARED_LIMITS.values()), launch


def test_more_tokens_than_int32_holds_are_refused() -> None:
    call = next(c for c in model_calls("pro", Chunk(64, 8192, 8192)) if c.op == "V4Fp8GroupedOutput")
    with pytest.raises(EngineError, match="V4Fp8GroupedOutput: one call has too many tokens for its kernels"):
        call.launches(PLANS)


def test_equal_calls_give_equal_launches_whatever_runs_them() -> None:
    call = model_calls("flash", Chunk(1, 1, 4096))[0]
    again = dataclasses.replace(call, role="another weight")
    assert call.launches(PLANS) == again.launches(PLANS)
