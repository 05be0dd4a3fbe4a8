"""TensorRT for the plugins, and one thread for torch: its idle threads spin beside the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from v4graph.trt import TensorRT, load


@pytest.fixture(scope="session")
def tensorrt() -> TensorRT:
    return load("rtx")


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
