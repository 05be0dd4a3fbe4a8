"""The emulator's op cases on this machine's GPU, through the driver, against the ops' torch references."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ALL_CASES
from kernel_run import KernelCase, check, run

from v4graph.gpu import gpus
from v4graph_plugins.cuda_driver import CudaDriver
from v4graph_plugins.host import Host
from v4graph_plugins.kernel_launcher import KernelLauncher
from v4graph_plugins.launcher import DeviceTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not gpus(), reason="no NVIDIA GPU with a working driver (v4graph.gpu.gpus() is empty)"
    ),
]

# The first case of each op is small and takes its plan's common path.
ONE_OF_EACH = tuple({case.case.op: case for case in reversed(ALL_CASES)}.values())


class DeviceMemory:
    """Tensors in the GPU's memory, each in an allocation of its own, unwritten ones all NaN."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}

    def put(self, tensor: torch.Tensor) -> DeviceTensor:
        return self._keep(tensor.cuda().contiguous())

    def reserve(self, shape: tuple[int, ...], dtype: str) -> DeviceTensor:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
        tensor.view(torch.uint8).fill_(255)
        return self._keep(tensor)

    def get(self, tensor: DeviceTensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return self._kept[tensor.address].cpu()

    def _keep(self, tensor: torch.Tensor) -> DeviceTensor:
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._kept[tensor.data_ptr()] = tensor
        return DeviceTensor(tensor.data_ptr(), tuple(tensor.shape), dtype)


@pytest.fixture(scope="module")
def launcher() -> KernelLauncher:
    torch.zeros(1, device="cuda")  # makes the context current
    found = Host().kernels(gpus()[0].target)
    assert found is not None, "compile the kernels first: v4graph kernels build"
    return KernelLauncher(CudaDriver(*found))


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_kernels_equal_the_reference(case: KernelCase, launcher: KernelLauncher) -> None:
    for seed in (0, 1):
        check(case, launcher, DeviceMemory(), seed)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_one_shape_of_each_op(case: KernelCase, launcher: KernelLauncher) -> None:
    """What `make sanitize-gpu` runs under compute-sanitizer."""
    check(case, launcher, DeviceMemory())


@pytest.mark.parametrize("case", ALL_CASES[::5], ids=str)
def test_the_same_call_gives_the_same_bits(case: KernelCase, launcher: KernelLauncher) -> None:
    first, _ = run(case, launcher, DeviceMemory())
    second, _ = run(case, launcher, DeviceMemory())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
