"""The toy engine as a TensorRT engine directory, and a machine that plays what is needed to run it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_trt import FakeTensorRT
from host_device import HostDevice
from toy_engine import CAPACITY, write_graph

from v4graph.gpu import Gpu
from v4graph.manifest import Manifest, Plugin, Profile, TensorRTBuild
from v4graph.trt import TensorRT
from v4graph_runtime import trt_checks
from v4graph_runtime.engine import sha256
from v4graph_runtime.trt_checks import Machine

MAX_BATCH, MAX_INPUT, DECODE = 4, 16, 8
HASH = "1" * 64
PROFILES = (
    Profile("decode", (1, MAX_BATCH, MAX_BATCH), (1, 1, DECODE), (CAPACITY,) * 3),
    Profile("prefill", (1, 1, MAX_BATCH), (1, MAX_INPUT, MAX_INPUT), (CAPACITY,) * 3),
)
RECORD = TensorRTBuild(
    package="tensorrt_rtx",
    version="1.7.1.116",
    cuda="13",
    targets=("sm89", "sm120"),
    profiles=PROFILES,
    plugins=(Plugin("V4WindowAttention", 1, HASH, 1),),
    bodies=(),
    layers=1,
    optimization_level=3,
    weight_streaming=False,
)
ADA = Gpu("NVIDIA L40S", "sm89", 48_000_000_000)


def write_engine(folder: Path, *, all_logits: bool = False, **changes: Any) -> Path:
    """Write a TensorRT engine directory of the toy model; `changes` replace manifest fields."""
    write_graph(folder, all_logits=all_logits)
    (folder / "model.onnx").rename(folder / "model.plan")
    config = Manifest.load(folder).config
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    fields: dict[str, Any] = {
        "kind": "engine",
        "backend": "trt",
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "files": {name: sha256(folder / name) for name in ("model.plan", "config.json")},
        "tensorrt": RECORD,
    }
    change(folder, **(fields | changes))
    return folder


def change(folder: Path, **fields: Any) -> None:
    """Replace fields of a directory's manifest."""
    dataclasses.replace(Manifest.load(folder), **fields).save(folder)


def from_onnxruntime(source: Path, folder: Path, record: TensorRTBuild) -> Path:
    """Write an engine directory for TensorRT whose plan is the graph of one for onnxruntime."""
    shutil.copytree(source, folder)
    (folder / "model.onnx").rename(folder / "model.plan")
    files = Manifest.load(folder).files
    files["model.plan"] = files.pop("model.onnx")
    change(folder, backend="trt", tensorrt=record, files=files)
    return folder


class NoFindings:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def take(self) -> list[str]:
        texts, self.texts = self.texts, []
        return texts


@dataclass
class FakeHost:
    known: Mapping[str, str] = field(default_factory=lambda: {"V4WindowAttention": HASH})
    trouble: str | None = None
    capturable: bool = True
    findings: NoFindings = field(default_factory=NoFindings)
    registered: Any = None
    asked: Any = None
    launcher: Any = None

    def hashes(self) -> Mapping[str, str]:
        return self.known

    def problem(self, dtype: str, gpu: str, folder: Path | None = None) -> str | None:
        self.asked = (dtype, gpu, folder)
        return self.trouble

    def register(self, trt: Any) -> None:
        self.registered = trt

    def use_launcher(self, dtype: str, gpu: str, folder: Path | None = None) -> None:
        self.launcher = (dtype, gpu, folder)


@dataclass
class ToyMachine:
    """A machine with one GPU that plays TensorRT; hand `machine` to the runtime with `install`."""

    device: HostDevice
    trt: FakeTensorRT
    host: FakeHost
    machine: Machine

    @classmethod
    def of(cls, engine: Path, *, rtx: bool = True, memory: int = 1 << 30) -> ToyMachine:
        manifest = Manifest.load(engine)
        assert manifest.tensorrt is not None
        device, host = HostDevice(memory), FakeHost()
        module = FakeTensorRT(manifest, device, rtx=rtx)
        loaded = TensorRT(module, manifest.tensorrt.package, manifest.tensorrt.version, "as asked")
        machine = Machine((ADA,), (13, 0), host, lambda _choice: loaded, lambda _index: device)
        return cls(device, module, host, machine)

    def install(self, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> ToyMachine:
        """Let the runtime find this machine; `changes` replace its parts."""
        self.machine = dataclasses.replace(self.machine, **changes)
        monkeypatch.setattr(trt_checks, "this_machine", lambda: self.machine)
        return self
