"""The generic plugin against the OpSpec of every op, without TensorRT and with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import OpCase, all_cases

from v4graph.errors import EngineError
from v4graph.ops import ALL_OPS, OPS_BY_NAME, OpSpec
from v4graph.ops.spec import FLOAT, WEIGHT
from v4graph.ops.tolerance import mismatch
from v4graph.trt import TensorRT
from v4graph_plugins import host as host_module
from v4graph_plugins.catalogue import PLUGIN_OPS
from v4graph_plugins.host import Host
from v4graph_plugins.launcher import DeviceTensor
from v4graph_plugins.plugin import Findings, check_shapes, output_types, plugin_classes
from v4graph_plugins.reference_launcher import ReferenceLauncher

CASES = [case for case in all_cases() if case.spec in PLUGIN_OPS]


def desc(tensor: torch.Tensor, trt: Any) -> Any:
    return SimpleNamespace(
        dims=tuple(tensor.shape), type=getattr(trt, str(tensor.dtype).removeprefix("torch.")),
        format=trt.TensorFormat.LINEAR,
    )  # fmt: skip


@pytest.fixture
def findings() -> Findings:
    found = Findings()
    found.launcher = ReferenceLauncher("cpu")
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_enqueue_computes_the_reference_in_place(
    case: OpCase, tensorrt: TensorRT, findings: Findings
) -> None:
    trt = tensorrt.module
    plugin_class, _ = plugin_classes(trt, findings)
    plugin = plugin_class(case.spec, dict(case.attributes), "here").clone()
    inputs = case.inputs()
    expected = case.reference({name: tensor.clone() for name, tensor in inputs.items()})
    outputs = [
        inputs[port.alias] if port.alias else torch.empty_like(value)
        for port, value in zip(case.spec.outputs, expected, strict=True)
    ]
    assert [plugin.get_aliased_input(i) for i in range(len(outputs))] == [
        list(inputs).index(port.alias) if port.alias else -1 for port in case.spec.outputs
    ]
    plugin.on_shape_change([desc(t, trt) for t in inputs.values()], [])
    plugin.enqueue(
        [desc(t, trt) for t in inputs.values()],
        [desc(t, trt) for t in outputs],
        [t.data_ptr() for t in inputs.values()],
        [t.data_ptr() for t in outputs],
        0,
        0,
    )
    for got, want in zip(outputs, expected, strict=True):
        assert mismatch(case.spec, got.numpy(), want.numpy(), case.attributes) == ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attributes_survive_the_plan(case: OpCase, tensorrt: TensorRT, findings: Findings) -> None:
    plugin_class, creator_class = plugin_classes(tensorrt.module, findings)
    fields = plugin_class(case.spec, dict(case.attributes), "here").get_fields_to_serialize()
    again = creator_class(case.spec).create_plugin("again", fields, None)
    for name, value in case.attributes.items():
        assert again.attributes[name] == (np.float32(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("spec", ALL_OPS, ids=lambda spec: spec.name)
def test_types_follow_the_graph(spec: OpSpec, findings: Findings) -> None:
    for dtype, matrix in itertools.product(("float32", "bfloat16"), repeat=2):
        kinds = {FLOAT: dtype, WEIGHT: matrix}
        inputs = [kinds.get(port.dtypes, port.dtypes[0]) for port in spec.inputs]
        outputs = [kinds.get(port.dtypes, port.dtypes[0]) for port in spec.outputs]
        assert output_types(spec, inputs, "here", findings) == outputs


def test_two_graph_types_on_one_node_are_refused(findings: Findings) -> None:
    with pytest.raises(EngineError, match="input 'weight' is float32, expected bfloat16"):
        output_types(OPS_BY_NAME["V4RmsNorm"], ["bfloat16", "float32"], "layers.0/V4RmsNorm", findings)
    assert findings.take()
    assert not findings.take()


def test_one_symbol_has_one_size(findings: Findings) -> None:
    spec = OPS_BY_NAME["V4Linear"]
    check_shapes(spec, [(-1, -1, 64), (32, 64)], "here", findings)
    with pytest.raises(
        EngineError, match=r"input 'weight' has shape \[32, 48\], expected \[O, K\] with O = 32"
    ):
        check_shapes(spec, [(2, 1, 64), (32, 48)], "here", findings)
    with pytest.raises(EngineError, match=r"input 'x' has shape \[2, 64\], expected \[B, S, K\]"):
        check_shapes(spec, [(2, 64), (32, 64)], "here", findings)


def test_a_missing_attribute_is_named(tensorrt: TensorRT, findings: Findings) -> None:
    _, creator_class = plugin_classes(tensorrt.module, findings)
    with pytest.raises(EngineError, match=r"layers\.0/V4RmsNorm: attribute 'eps' of V4RmsNorm is missing"):
        creator_class(OPS_BY_NAME["V4RmsNorm"]).create_plugin("layers.0/V4RmsNorm", [], None)


def test_only_linear_layouts_of_the_ports_types_are_supported(tensorrt: TensorRT, findings: Findings) -> None:
    trt = tensorrt.module
    plugin = plugin_classes(trt, findings)[0](OPS_BY_NAME["V4RmsNorm"], {"eps": 1e-6}, "here")

    def tensor(dtype: Any, layout: Any = trt.TensorFormat.LINEAR) -> Any:
        return SimpleNamespace(desc=SimpleNamespace(type=dtype, format=layout))

    same = [tensor(trt.bfloat16)] * 3
    assert all(plugin.supports_format_combination(i, same, 2) for i in range(3))
    assert not plugin.supports_format_combination(1, [tensor(trt.bfloat16), tensor(trt.float32)], 2)
    assert not plugin.supports_format_combination(0, [tensor(trt.int8)], 2)
    assert not plugin.supports_format_combination(0, [tensor(trt.bfloat16, trt.TensorFormat.CHW32)], 2)


def test_a_matrix_has_a_type_of_its_own(tensorrt: TensorRT, findings: Findings) -> None:
    trt = tensorrt.module
    plugin = plugin_classes(trt, findings)[0](OPS_BY_NAME["V4Linear"], {}, "here")

    def fits(*dtypes: Any) -> bool:
        linear = trt.TensorFormat.LINEAR
        tensors = [SimpleNamespace(desc=SimpleNamespace(type=dtype, format=linear)) for dtype in dtypes]
        return all(plugin.supports_format_combination(i, tensors, 2) for i in range(3))

    assert fits(trt.float32, trt.bfloat16, trt.float32)
    assert fits(trt.float32, trt.float32, trt.float32)
    assert not fits(trt.float32, trt.bfloat16, trt.bfloat16)
    assert not fits(trt.float32, trt.int8, trt.float32)


def test_a_call_without_launcher_is_refused(tensorrt: TensorRT) -> None:
    plugin = plugin_classes(tensorrt.module, Findings())[0](OPS_BY_NAME["V4RmsNorm"], {"eps": 1e-6}, "here")
    with pytest.raises(EngineError, match="no launcher was set"):
        plugin.enqueue([], [], [], [], 0, 0)


def test_host_registers_once_and_hashes_every_plugin(tensorrt: TensorRT) -> None:
    host = Host()
    host.register(tensorrt.module)
    host.register(tensorrt.module)
    assert host.hashes().keys() == {spec.name for spec in PLUGIN_OPS}
    assert len(set(host.hashes().values())) == len(PLUGIN_OPS)
    registry = tensorrt.module.get_plugin_registry()
    for spec in PLUGIN_OPS:
        assert registry.get_creator(spec.name, str(spec.version), "") is not None


def test_host_says_what_its_plugins_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(tmp_path)
    monkeypatch.setattr(host_module.metadata, "version", lambda _name: "2.13.0+cpu")
    assert host.problem("bfloat16", "sm90") == (
        "no kernels are compiled here, and torch, which would run the ops' references, is built without "
        "CUDA; "
        "compile them with `v4graph kernels build` or install a CUDA build of torch"
    )
    assert host.problem("float32", "sm90") == (
        "the kernels compute in bfloat16 and this graph is float32, and torch, which would run the ops' "
        "references, is built without CUDA; export it with --dtype bf16 or install a CUDA build of torch"
    )
    monkeypatch.setattr(host_module.metadata, "version", lambda _name: "2.13.0")
    assert host.problem("bfloat16", "sm90") is None
    monkeypatch.setattr(host_module, "installed", lambda _name: False)
    assert "there is no torch to run the ops' references with" in (host.problem("bfloat16", "sm90") or "")


def test_device_tensor_counts_bytes() -> None:
    assert DeviceTensor(0, (2, 3), "bfloat16").nbytes == 12
