"""Kernels on a GPU, through the CUDA driver; no torch and no compiler."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from v4graph.errors import EngineError
from v4graph.launch import Launch
from v4graph_plugins.kernel_files import KernelFiles

# More than this has to be asked for.
_SHARED_BY_DEFAULT = 48 << 10


class CudaDriver:
    """Backend of `KernelLauncher` on the current CUDA context, with the kernels of `files` for `target`.

    A unit is loaded when its first kernel is launched, once per context.
    """

    capturable = True

    def __init__(self, files: KernelFiles, target: str) -> None:
        """Import the driver's bindings.

        Raises:
            EngineError: cuda-bindings is not installed.
        """
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise EngineError(
                "launching kernels needs cuda-bindings; install it with `pip install 'cuda-bindings>=13.0'`."
            ) from error
        self._files, self._target = files, target
        self._modules: dict[tuple[int, str], Any] = {}
        self._functions: dict[tuple[int, str], Any] = {}
        self._shared: dict[tuple[int, str], int] = {}

    def signature(self, kernel: str) -> str:
        """Return a letter per parameter of a kernel."""
        return self._files.signature(kernel)

    def run(self, launch: Launch, values: Sequence[Any], stream: int) -> None:
        """Enqueue one launch.

        Raises:
            EngineError: the driver refuses the kernel or the launch.
        """
        context = int(self._call("cuCtxGetCurrent"))
        function = self._function(context, launch.kernel)
        key = (context, launch.kernel)
        if launch.shared > max(_SHARED_BY_DEFAULT, self._shared.get(key, 0)):
            attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, attribute, launch.shared, what=launch.kernel)
            self._shared[key] = launch.shared
        numbers = tuple(value.value or 0 for value in values)
        arguments = (numbers, tuple(type(value) for value in values)) if values else 0
        self._call(
            "cuLaunchKernel",
            function,
            *launch.grid,
            *(launch.block, 1, 1),
            launch.shared,
            stream,
            arguments,
            0,
            what=launch.kernel,
        )

    def _function(self, context: int, kernel: str) -> Any:
        key = (context, kernel)
        if key not in self._functions:
            unit, _, name = kernel.partition(".")
            if (context, unit) not in self._modules:
                # The driver reads PTX up to a NUL.
                image = self._files.file(self._target, unit).read_bytes() + b"\0"
                self._modules[context, unit] = self._call("cuModuleLoadData", image, what=f"kernels '{unit}'")
            module = self._modules[context, unit]
            self._functions[key] = self._call("cuModuleGetFunction", module, name.encode(), what=kernel)
        return self._functions[key]

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        status, *results = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            word = getattr(status, "name", str(status))
            raise EngineError(
                f"{what or name}: the CUDA driver answers {word} to {name} (kernels for {self._target}); "
                "`v4graph doctor` shows the GPU and its driver, `v4graph kernels build` compiles kernels "
                "for it."
            )
        return results[0] if results else None
