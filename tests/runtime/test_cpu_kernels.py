"""The native CPU kernels give the reference's numbers, on every instruction set that this machine has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from op_cases import OpCase, all_cases, as_numpy

from v4graph.numerics import fake_fp4
from v4graph.ops import ALL_OPS, DOMAIN
from v4graph.ops.tolerance import mismatch
from v4graph.verify.graph_runner import fed
from v4graph_export import bodies
from v4graph_export.functions import OPSETS
from v4graph_runtime import cpu_kernels

CASES = list(all_cases())
_ONNX = {torch.float32: ir.DataType.FLOAT, torch.int8: ir.DataType.INT8, torch.bfloat16: ir.DataType.BFLOAT16}
_ONNX |= {torch.int32: ir.DataType.INT32, torch.int64: ir.DataType.INT64}
_KINDS = {float: "f", int: "i", str: "t"}


@pytest.fixture(scope="session")
def library() -> Path:
    """Return the library, compiled if it is not up to date."""
    named = cpu_kernels.library_path()
    if named is None or named == cpu_kernels.LIBRARY:
        cpu_kernels.build_library(cpu_kernels.find_compiler())
    path = cpu_kernels.library_path()
    assert path
    return path


SETS = tuple(cpu_kernels.SETS)


def run_kernel(case: OpCase, inputs: dict[str, torch.Tensor], isa: str, threads: int = 2) -> list[np.ndarray]:
    """Run one op in onnxruntime with no body: the kernel must be there."""
    values = [
        ir.Value(name=name, type=ir.TensorType(_ONNX[t.dtype]), shape=ir.Shape([None] * t.dim()))
        for name, t in inputs.items()
    ]
    attributes = [ir.convenience.convert_attribute(k, v) for k, v in case.attributes.items()]
    node = ir.Node(DOMAIN, case.variant.name, values, attributes, num_outputs=len(case.spec.outputs))
    for value, port in zip(node.outputs, case.spec.outputs, strict=True):
        value.name = f"out_{port.name}"
        dtype = ir.DataType.INT32 if port.dtypes == ("int32",) else ir.DataType.FLOAT
        value.type, value.shape = ir.TensorType(dtype), ir.Shape([None] * len(port.dims))
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports=dict(OPSETS), name="one_op")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    cpu_kernels.register(settings, [case.variant.name], threads, isa)
    session = onnxruntime.InferenceSession(
        ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(),
        settings,
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, fed({name: as_numpy(t) for name, t in inputs.items()}))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_reference(case: OpCase, isa: str, library: Path) -> None:
    if isa not in cpu_kernels.instruction_sets(cpu_kernels.open_library(library)):
        pytest.skip(f"this machine does not run {isa}")
    inputs = case.inputs()
    expected = case.reference(inputs)
    for got, want, port in zip(run_kernel(case, inputs, isa), expected, case.spec.outputs, strict=True):
        assert not mismatch(case.spec, got, want.numpy(), case.attributes), port.name


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("case", [case for case in CASES if "bfloat16" in case.weights], ids=str)
def test_bfloat16_matrices_give_the_bits_of_their_float32_copies(
    case: OpCase, isa: str, library: Path
) -> None:
    if isa not in cpu_kernels.instruction_sets(cpu_kernels.open_library(library)):
        pytest.skip(f"this machine does not run {isa}")
    inputs = case.inputs()
    copies = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in inputs.items()}
    for got, want in zip(run_kernel(case, inputs, isa), run_kernel(case, copies, isa), strict=True):
        np.testing.assert_array_equal(got, want)


def test_kernels_have_the_ports_of_the_catalogue(library: Path) -> None:
    listed = cpu_kernels.open_library(library).v4graph_cpu_ops().decode().splitlines()
    found = {}
    for line in listed:
        name, inputs, outputs, *attributes = line.split(" ")
        found[name] = (int(inputs), outputs, sorted(attributes[0]))
    letters = {
        "eps": "e", "hc_eps": "h", "limit": "l", "scale": "s", "iters": "n", "overlap": "o",
        "window": "w", "ratio": "r", "topk": "k", "groups": "g",
    }  # fmt: skip
    wanted = {}
    for spec in ALL_OPS:
        outputs = "".join("i" if port.dtypes == ("int32",) else "f" for port in spec.outputs)
        keys = [letters.get(name, "t" if kind is str else "q") for name, kind in spec.attributes.items()]
        wanted[spec.name] = (len(spec.inputs), outputs, sorted(keys))
    assert found == wanted


def test_every_shipped_variant_has_a_kernel(library: Path) -> None:
    listed = cpu_kernels.open_library(library).v4graph_cpu_ops().decode().splitlines()
    names = {line.split(" ")[0] for line in listed}
    assert {variant.name.partition("__")[0] for variant in bodies.shipped_variants("float32")} <= names


ENTRIES = 1500
INDEX = {"topk": 64, "ratio": 4, "quantise": 1, "scale": 128**-0.5 * 0.25}


def index_case(tokens: int, heads: int = 16) -> OpCase:
    sizes = {"S": tokens, "Q": heads * 128, "Hi": heads, "C": 128, "F": 32, "N": ENTRIES}
    return OpCase("V4IndexTopK", sizes, INDEX, (4 * ENTRIES - tokens,), (tokens,))


def stored_keys(kind: str) -> np.ndarray:
    random = np.random.default_rng(3)
    keys = fake_fp4(random.standard_normal((ENTRIES, 128), np.float32))
    if kind == "far apart":
        # No common quantum of seven bits: the last block counts for nothing, but must not be lost.
        keys[::5, 96:] *= np.float32(2.0**-12)
    if kind == "not rounded":
        keys[1::7] = random.standard_normal(keys[1::7].shape, np.float32)
    if kind == "extreme":
        keys[::3], keys[1::3] = 0, keys[1::3] * np.float32(2.0**-60)
        keys[2::30] *= np.float32(2.0**50)
    return keys


@pytest.mark.parametrize("kind", ["rounded", "far apart", "not rounded", "extreme"])
@pytest.mark.parametrize("isa", SETS)
def test_stored_keys_of_every_kind_are_selected_as_by_the_reference(
    isa: str, kind: str, library: Path
) -> None:
    if isa not in cpu_kernels.instruction_sets(cpu_kernels.open_library(library)):
        pytest.skip(f"this machine does not run {isa}")
    for tokens, heads in ((1, 16), (9, 16), (2, 18)):
        case = index_case(tokens, heads)
        inputs = case.inputs() | {"keys": torch.from_numpy(stored_keys(kind)[None])}
        (rows,) = run_kernel(case, inputs, isa)
        np.testing.assert_array_equal(rows, case.reference(inputs)[0].numpy())


@pytest.mark.parametrize("op", ["V4IndexTopK", "V4CompressedAttention"])
def test_one_tokens_work_gives_the_same_bits_on_any_number_of_threads(op: str, library: Path) -> None:
    case = index_case(1)
    change = {"keys": torch.from_numpy(stored_keys("not rounded")[None])}
    if op == "V4CompressedAttention":
        sizes = {"S": 1, "H": 13, "Dh": 192, "F": 32, "L": 24, "N": ENTRIES}
        case, change = (
            OpCase(op, sizes, {"window": 16, "ratio": 4, "scale": 0.07}, (4 * ENTRIES - 1,), (1,)),
            {},
        )
    inputs = case.inputs() | change
    alone, *others = (run_kernel(case, inputs, "", threads) for threads in (1, 2, 3, 8))
    for other in others:
        for got, want in zip(other, alone, strict=True):
            np.testing.assert_array_equal(got, want)
