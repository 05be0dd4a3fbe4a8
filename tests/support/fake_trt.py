"""A TensorRT whose plans are ONNX models, run by onnxruntime on the addresses that were set.

`FakeTensorRT` stands for the module: for RTX it has the names that full TensorRT lacks. What the real one
leaves undefined fails here: unset addresses, states that are not in place, a context changed after capture.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np
import onnxruntime
from host_device import HostDevice

from v4graph.manifest import Manifest
from v4graph.numerics import BF16
from v4graph.verify.graph_runner import fed
from v4graph_runtime.state import state_tensors

SCRATCH = 1000
TYPES = {
    "tensor(float)": np.float32,
    "tensor(bfloat16)": BF16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
}


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity


class Mode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class Allocation(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Kernels(enum.IntEnum):
    LAZY, EAGER, NONE = range(3)


class Validity(enum.IntEnum):
    VALID, SUBOPTIMAL, INVALID = range(3)


class Diagnostics(enum.IntEnum):
    VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER = 1, 2, 4


class FakeTensorRT:
    ILogger = ILogger
    TensorIOMode = Mode
    ExecutionContextAllocationStrategy = Allocation
    EngineValidity, EngineInvalidityDiagnostics = Validity, Diagnostics

    def __init__(self, manifest: Manifest, device: HostDevice, *, rtx: bool = True) -> None:
        self.manifest, self.device, self.rtx = manifest, device, rtx
        self.validity: tuple[Validity, int] = (Validity.VALID, 0)
        # What to fail at: "deserialize", "context", "profile", "execute", "capture", "capturable".
        self.broken = ""
        self.contexts: list[FakeContext] = []
        self.open_contexts = 0
        if rtx:
            self.DynamicShapesKernelSpecializationStrategy = Kernels
            self.IRuntimeCache = FakeCache

    def Runtime(self, logger: Any) -> Any:  # noqa: N802  (TensorRT's name)
        return FakeRtxRuntime(self, logger) if self.rtx else FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        if self.trt.broken == "deserialize":
            self.logger.log(Severity.INFO, "loading")
            self.logger.log(Severity.ERROR, "Error Code 1: Serialization\n")
            return None
        return FakeEngine(self.trt, self.logger, bytes(plan))


class FakeRtxRuntime(FakeRuntime):
    def get_engine_validity(self, plan: Any) -> Any:
        return self.trt.validity


class FakeCache:
    def __init__(self) -> None:
        self.kernels = 0

    def serialize(self) -> bytes:
        return b"kernels %d" % self.kernels

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels "):
            return False
        self.kernels = int(blob.removeprefix(b"kernels "))
        return True


class FakeConfig:
    cache: FakeCache | None = None
    allocation = Allocation.STATIC
    dynamic_shapes_kernel_specialization_strategy = Kernels.LAZY

    def create_runtime_cache(self) -> FakeCache:
        return FakeCache()

    def set_runtime_cache(self, cache: FakeCache) -> bool:
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: Allocation) -> None:
        self.allocation = strategy


class FakeEngine:
    device_memory_size_v2 = SCRATCH
    streamable_weights_size = 0

    def __init__(self, trt: FakeTensorRT, logger: Any, plan: bytes) -> None:
        self.trt, self.logger = trt, logger
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def create_runtime_config(self) -> FakeConfig:
        assert self.trt.rtx
        return FakeConfig()

    def create_execution_context(self, how: Any) -> Any:
        if self.trt.broken == "context":
            self.logger.log(Severity.INTERNAL_ERROR, "no context")
            return None
        config = how if isinstance(how, FakeConfig) else FakeConfig()
        allocation = config.allocation if how is config else how
        assert allocation == Allocation.USER_MANAGED
        context = (FakeRtxContext if self.trt.rtx else FakeContext)(self, config)
        self.trt.contexts.append(context)
        return context


class FakeContext:
    def __init__(self, engine: FakeEngine, config: FakeConfig) -> None:
        self.engine, self.config, self.trt = engine, config, engine.trt
        self.profile: int | None = None
        self.scratch = 0
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.executions = self.changes = 0
        manifest = self.trt.manifest
        weights = {name: b.shape for b in manifest.bindings for name, _ in b.inputs()}
        self.static = {} if manifest.embedded_weights else weights

    def fail(self, message: str) -> bool:
        self.engine.logger.log(Severity.ERROR, message)
        return False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == self.trt.device.stream
        self.profile = index
        return self.trt.broken != "profile" or self.fail("no such profile")

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= SCRATCH
        assert address in self.trt.device.blocks
        self.scratch = address

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.changes += 1
        self.addresses[name] = address
        return name in self.engine.inputs + self.engine.outputs or self.fail(f"no tensor {name}")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        record, index = self.trt.manifest.tensorrt, self.profile
        assert record is not None
        assert index is not None
        if name == "input_ids":
            ranges = (record.profiles[index].batch, record.profiles[index].tokens)
            if not all(low <= size <= high for size, (low, _, high) in zip(shape, ranges, strict=True)):
                return self.fail(f"{name}: {shape} is outside {ranges}")
        self.changes += 1
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        device = self.trt.device
        assert stream == device.stream
        assert self.scratch in device.blocks
        assert not ({*self.engine.inputs, *self.engine.outputs} - self.addresses.keys())
        for state in state_tensors(self.trt.manifest, 1):
            assert self.addresses[state.name] == self.addresses[state.output], "aliased plugin I/O"
        if self.trt.broken == "execute" or (self.trt.broken == "capture" and device.recording is not None):
            return self.fail("enqueue failed")
        self.executions += 1
        if self.config.cache is not None:
            self.config.cache.kernels += 1
        addresses, shapes, changes = dict(self.addresses), self.shapes | self.static, self.changes
        captured = device.recording is not None

        def work() -> None:
            assert not captured or self.changes == changes, "changed after it was captured"
            self.compute(addresses, shapes)

        device.put(work)
        return True

    def compute(self, addresses: dict[str, int], shapes: dict[str, Any]) -> None:
        device = self.trt.device
        feeds = {
            value.name: device.view(addresses[value.name], shapes[value.name], TYPES[value.type]).copy()
            for value in self.engine.session.get_inputs()
        }
        results = self.engine.session.run(None, fed(feeds))
        for name, result in zip(self.engine.outputs, results, strict=True):
            np.copyto(device.view(addresses[name], result.shape, result.dtype), result)


class FakeRtxContext(FakeContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.broken != "capturable"
