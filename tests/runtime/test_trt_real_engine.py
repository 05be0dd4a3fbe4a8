"""A real model's weights and states through the TensorRT backend, and real plans as far as they go here."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from engines import Built
from graphs import export_nano
from toy_trt import RECORD, ToyMachine, from_onnxruntime

from v4graph.checkpoint import Checkpoint
from v4graph.errors import EngineError
from v4graph.gpu import gpus
from v4graph.manifest import Profile
from v4graph.trt import load
from v4graph_plugins.build import BuildOptions, build_engine
from v4graph_plugins.host import Host
from v4graph_runtime import Session, trt_checks
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.trt_engine import TrtEngine

CAPACITY = 128
PROFILES = (
    Profile("decode", (1, 2, 2), (1, 1, 8), (CAPACITY,) * 3),
    Profile("prefill", (1, 1, 2), (1, 32, 32), (CAPACITY,) * 3),
)
NO_GPU = pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU: see tests/gpu")


def test_a_real_models_weights_and_states_arrive_where_the_graph_reads_them(
    official: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = dataclasses.replace(RECORD, profiles=PROFILES, plugins=())
    engine = from_onnxruntime(official.engine, tmp_path / "engine", record)
    toy = ToyMachine.of(engine).install(monkeypatch)
    ids = np.random.default_rng(3).integers(0, 32, (2, 50))
    steps = [
        (ids[:, :37], [37, 20]),
        (ids[:, 37:38], [1, 0]),
        (ids[:, 38:40], [2, 2]),
        (ids[:, 40:41], [1, 1]),
    ]
    with Session(engine, official.checkpoint, batch=2) as session:
        assert len(toy.device.uploads) == len(
            list(Checkpoint.open(official.checkpoint).bound(session.manifest))
        )
        got = [session.prefill(*step) for step in steps]
        assert toy.device.launches == 1
    # The toy machine runs the bodies.
    plain = Session(official.engine, official.checkpoint, batch=2, options=OrtOptions(kernels=False))
    for logits, step in zip(got, steps, strict=True):
        np.testing.assert_array_equal(logits, plain.prefill(*step))


@pytest.fixture(scope="module")
def nano_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    export_nano(folder / "graph")
    options = BuildOptions(targets=("sm89",), tensorrt="rtx")
    build_engine(folder / "graph", folder / "engine", options, lambda *_: None)
    return folder / "engine"


@NO_GPU
def test_a_plan_built_here_passes_every_check_but_that_for_a_gpu(
    nano_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = dataclasses.replace(trt_checks.this_machine(), host=Host())
    monkeypatch.setattr(trt_checks, "this_machine", lambda: machine)
    with pytest.raises(
        EngineError, match=r"no NVIDIA GPU .*; this machine can build engines but not run them"
    ):
        Session(nano_engine, None)


@NO_GPU
def test_the_real_tensorrt_refuses_a_plan_without_a_gpu_below_our_sentence(nano_engine: Path) -> None:
    with pytest.raises(EngineError) as error:
        TrtEngine(nano_engine, load("rtx"), findings=None, runtime_cache=True)
    ours, *_theirs = str(error.value).splitlines()
    assert "model.plan: TensorRT for RTX" in ours
    assert "it cannot run here" in ours


NAMES = """
Runtime: deserialize_cuda_engine get_engine_validity
ICudaEngine: device_memory_size_v2 num_io_tensors get_tensor_name get_tensor_mode create_runtime_config
ICudaEngine: create_execution_context get_weight_streaming_automatic_budget weight_streaming_budget_v2
ICudaEngine: streamable_weights_size
IExecutionContext: set_optimization_profile_async set_device_memory set_tensor_address set_input_shape
IExecutionContext: execute_async_v3 is_stream_capturable
IRuntimeConfig: set_execution_context_allocation_strategy set_runtime_cache create_runtime_cache
IRuntimeConfig: dynamic_shapes_kernel_specialization_strategy
IRuntimeCache: serialize deserialize
ExecutionContextAllocationStrategy: USER_MANAGED
DynamicShapesKernelSpecializationStrategy: EAGER LAZY
EngineValidity: INVALID SUBOPTIMAL
TensorIOMode: INPUT
"""


def test_every_name_that_the_runtime_uses_is_one_of_tensorrts() -> None:
    module = load("rtx").module
    lines = [line.split(": ") for line in NAMES.strip().splitlines()]
    names = [(kind, name) for kind, text in lines for name in text.split()]
    assert [pair for pair in names if not hasattr(getattr(module, pair[0]), pair[1])] == []
    assert all(int(kind) > 0 for kind in module.EngineInvalidityDiagnostics.__members__.values())
