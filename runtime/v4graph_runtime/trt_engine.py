"""model.plan to execution contexts, for full TensorRT and TensorRT for RTX alike.

Where the two differ, `hasattr` decides: only TensorRT for RTX compiles kernels on the GPU, and so has a
check of the plan before it is loaded and a cache of compiled kernels (runtime.cache, beside the plan).
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from v4graph.errors import EngineError
from v4graph.trt import TensorRT
from v4graph_runtime.plugin_host import Findings

logger = logging.getLogger(__name__)
PLAN = "model.plan"
RUNTIME_CACHE = "runtime.cache"
# TensorRT repeats itself when one failure causes the next.
MOST_LINES = 12


class TrtEngine:
    """A deserialised plan. `close` before the device goes; contexts must be dropped first."""

    def __init__(
        self, directory: Path, tensorrt: TensorRT, *, findings: Findings | None, runtime_cache: bool
    ) -> None:
        """Load the plan on the current GPU; its plugins, whose `findings` these are, must be registered.

        Raises:
            EngineError: TensorRT refuses the plan; its reasons are kept below ours.
        """
        self.directory, self.tensorrt, self._trt = directory, tensorrt, tensorrt.module
        self._findings = findings
        self._log = _logger_class(self._trt)()
        self._runtime = self._trt.Runtime(self._log)
        plan = np.memmap(directory / PLAN, np.uint8, mode="r")
        self._check_validity(plan)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise self.failure(f"{directory / PLAN}: {tensorrt} cannot load it")
        self._stream_weights()
        self._cache_config: Any = None
        self._cache = self._load_cache() if runtime_cache else None

    @property
    def scratch_bytes(self) -> int:
        """Bytes of device memory that one running context needs."""
        return int(self.engine.device_memory_size_v2)

    def tensors(self) -> dict[str, bool]:
        """Return the names of the plan's inputs (True) and outputs (False)."""
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = self._trt.TensorIOMode.INPUT
        return {name: self.engine.get_tensor_mode(name) == inputs for name in names}

    def context(self, *, fixed_shapes: bool) -> Any:
        """Make an execution context that is given its scratch memory by the caller.

        `fixed_shapes` promises one set of shapes, for which kernels are then compiled at the first run.

        Raises:
            EngineError: TensorRT cannot make one.
        """
        own_memory = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        how: Any = own_memory
        if self._cache is not None or hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            how = self.engine.create_runtime_config()
            how.set_execution_context_allocation_strategy(own_memory)
            if self._cache is not None:
                how.set_runtime_cache(self._cache)
            # A captured graph keeps the kernels it has seen, so they must not be stand-ins.
            strategy = self._trt.DynamicShapesKernelSpecializationStrategy
            how.dynamic_shapes_kernel_specialization_strategy = (
                strategy.EAGER if fixed_shapes else strategy.LAZY
            )
        context = self.engine.create_execution_context(how)
        if context is None:
            raise self.failure(f"{self.directory / PLAN}: TensorRT cannot make an execution context")
        return context

    def failure(self, text: str) -> EngineError:
        """Return the error to raise: our sentence, then what plugins and TensorRT said since the last one."""
        found = self._findings.take() if self._findings is not None else []
        return EngineError("\n".join([f"{text}.", *found, *self._log.take()]))

    def save_cache(self) -> None:
        """Write runtime.cache beside the plan; a folder that cannot be written costs time, not the run."""
        if self._cache is None:
            return
        path = self.directory / RUNTIME_CACHE
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            blob = self._cache.serialize()
            if blob is None:
                return
            partial.write_bytes(blob)
            partial.replace(path)
        except OSError as error:
            logger.warning("%s: cannot be written (%s); kernels are compiled again next time", path, error)
            partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Save the kernels compiled so far and free the engine."""
        self.save_cache()
        # In this order: TensorRT wants a runtime to outlive its engines.
        self._cache = self._cache_config = None
        self.engine = None
        self._runtime = None

    def _check_validity(self, plan: Any) -> None:
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, diagnostics = self._runtime.get_engine_validity(plan)
        kinds = self._trt.EngineInvalidityDiagnostics.__members__.items()
        bits = int(diagnostics)
        reasons = [name.lower().replace("_", " ") for name, kind in kinds if int(kind) & bits]
        said = ", ".join(reasons) or "no reason given"
        if validity == self._trt.EngineValidity.INVALID:
            raise self.failure(
                f"{self.directory / PLAN}: {self.tensorrt} says that it cannot run here ({said})"
            )
        if validity == self._trt.EngineValidity.SUBOPTIMAL:
            logger.warning("%s: TensorRT says that it will run slower here (%s)", self.directory / PLAN, said)

    def _stream_weights(self) -> None:
        if getattr(self.engine, "streamable_weights_size", 0):
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()

    def _load_cache(self) -> Any:
        if not hasattr(self._trt, "IRuntimeCache"):
            return None
        # The bindings do not say who owns a cache, so the configuration that made it is kept.
        self._cache_config = self.engine.create_runtime_config()
        cache = self._cache_config.create_runtime_cache()
        path = self.directory / RUNTIME_CACHE
        if path.is_file() and not cache.deserialize(path.read_bytes()):
            logger.info("%s: made by another TensorRT, driver or GPU; kernels are compiled again", path)
            # TensorRT logs a refused cache as an error, which it is not.
            self._log.take()
        return cache


@functools.cache
def _logger_class(trt: Any) -> type[Any]:
    """Return a TensorRT logger class that keeps errors and passes the rest on to `logging`."""
    severity = trt.ILogger.Severity
    failures = (severity.INTERNAL_ERROR, severity.ERROR)

    class RuntimeLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in failures:
                self.errors.append(message.strip())
            logger.debug("%s", message)

        def take(self) -> list[str]:
            lines, self.errors = self.errors, []
            return [f"TensorRT: {line}" for line in lines[:MOST_LINES]]

    return RuntimeLogger
