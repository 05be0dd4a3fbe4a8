"""`v4graph doctor` on machines with and without GPUs, packages and drivers."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import Result
from cuda_ort import CPU, H200, install, plain_module

from v4graph import trt
from v4graph.doctor import Report, examine
from v4graph.doctor import backends as doctor_backends
from v4graph.doctor import packages as doctor_packages
from v4graph.errors import EngineError
from v4graph.gpu import Gpu
from v4graph.targets import PORTABLE, RTX_TARGETS

L4 = Gpu("NVIDIA L4", "sm89", 24_000_000_000)

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]
CPU_PACKAGE = {"get_available_providers": lambda: [CPU], "cuda_version": ""}
NO_GPU = "no NVIDIA GPU with a working driver is found; install NVIDIA's driver if there is a GPU."
Machine = Callable[..., Report]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Examine a machine with these GPUs and this driver, onnxruntime and the TensorRTs of `versions`."""

    def examined(
        *gpus: Gpu,
        driver: tuple[int, int] | None = (13, 0),
        onnxruntime: Any = None,
        packages: dict[str, str] | None = None,
        versions: dict[str, str] | None = None,
        plugin_problem: str | None = None,
    ) -> Report:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        driver = driver if gpus else None
        install(monkeypatch, onnxruntime or plain_module(), gpus=gpus, driver=driver, packages=packages)
        for module in ("v4graph.doctor", "v4graph.doctor.backends"):
            monkeypatch.setattr(f"{module}.gpus", lambda: gpus)
            monkeypatch.setattr(f"{module}.driver_version", lambda: driver)
        found = {"tensorrt_rtx": "1.7.1"} if versions is None else versions

        def load(choice: trt.Choice) -> trt.TensorRT:
            package = trt.PACKAGES[choice]
            return trt.TensorRT(None, package, found[package], "as asked")

        monkeypatch.setattr("v4graph.trt.installed", lambda package: package in found)
        monkeypatch.setattr("v4graph.trt.load", load)
        monkeypatch.setattr("v4graph.trt.cuda_version", lambda _package: "13")
        monkeypatch.setattr("v4graph.doctor.backends._plugin_problem", lambda: plugin_problem)
        monkeypatch.setattr("v4graph.doctor.backends._distribution", lambda _name: True)
        monkeypatch.setattr("v4graph.doctor.package_problems", lambda _packages: [])
        return examine()

    return examined


def able(report: Report) -> dict[str, tuple[bool, bool]]:
    return {backend.name: (backend.builds, backend.runs) for backend in report.backends}


def test_without_a_gpu_it_builds_and_runs_on_the_cpu(machine: Machine) -> None:
    report = machine(onnxruntime=plain_module(**CPU_PACKAGE), packages={"onnxruntime": "1.32.0"})
    assert able(report) == {
        "ort-cpu": (True, True),
        "ort-cuda": (True, False),
        "trt-rtx": (True, False),
        "trt-full": (False, False),
    }
    rtx = report.backends[2]
    assert rtx.build_targets == (PORTABLE, *RTX_TARGETS)
    assert rtx.run_targets == ()
    assert report.problems == (NO_GPU,)
    assert report.works


def test_with_a_gpu_every_backend_runs(machine: Machine) -> None:
    report = machine(L4, versions={"tensorrt": "11.4.0", "tensorrt_rtx": "1.7.1"})
    assert set(able(report).values()) == {(True, True)}
    assert report.backends[3].build_targets == report.backends[3].run_targets == ("sm89",)
    assert report.problems == ()


def test_hopper_is_full_tensorrts(machine: Machine) -> None:
    report = machine(H200, versions={"tensorrt": "11.4.0", "tensorrt_rtx": "1.7.1"})
    _, _, rtx, full = report.backends
    assert (rtx.runs, rtx.run_targets, rtx.note) == (False, (), "does not run on sm90; trt-full does")
    assert full.build_targets == full.run_targets == ("sm90",)
    assert report.problems == ()


def test_a_gpu_runs_the_targets_that_fit_it(machine: Machine) -> None:
    report = machine(L4)
    assert report.backends[2].run_targets == (PORTABLE, "sm89")
    assert report.backends[3].note == "not installed: pip install 'v4graph[trt]'"


@pytest.mark.parametrize("gpu", [Gpu("Tesla T4", "sm75", 16_000_000_000), H200], ids=lambda gpu: gpu.target)
def test_a_gpu_without_a_target_is_told(machine: Machine, gpu: Gpu) -> None:
    report = machine(gpu)
    assert able(report)["trt-rtx"] == (True, False)
    (problem,) = report.problems
    assert problem == (
        f"TensorRT for RTX 1.7.1 has no target that runs on {gpu.target}; use full TensorRT, "
        "`pip install 'v4graph[trt]'`."
    )


def test_an_old_driver_is_named_with_the_one_to_install(machine: Machine) -> None:
    report = machine(H200, driver=(12, 8))
    wanted = "the driver runs CUDA 12.8 at most; install NVIDIA's driver 580 or later"
    assert f"TensorRT for RTX 1.7.1 is built for CUDA 13, {wanted}." in report.problems
    assert any(f"onnxruntime-gpu 1.31.1 is built for CUDA 13, {wanted};" in line for line in report.problems)
    assert able(report) == {
        "ort-cpu": (True, True),
        "ort-cuda": (True, False),
        "trt-rtx": (True, False),
        "trt-full": (False, False),
    }


def test_the_cpu_package_beside_a_gpu_is_a_problem(machine: Machine) -> None:
    report = machine(L4, onnxruntime=plain_module(**CPU_PACKAGE), packages={"onnxruntime": "1.32.0"})
    (problem,) = report.problems
    assert "run `pip uninstall onnxruntime`, then `pip install 'v4graph[ort-gpu]'`" in problem
    assert able(report)["ort-cpu"] == (True, True)


def test_a_cuda_provider_that_does_not_start_is_found_by_opening_a_graph(machine: Machine) -> None:
    opened: list[str] = []

    def on_the_cpu(path: str, *_rest: Any, **_options: Any) -> Any:
        opened.append(path)
        return types.SimpleNamespace(get_providers=lambda: [CPU])

    report = machine(H200, onnxruntime=plain_module(InferenceSession=on_the_cpu))
    assert able(report)["ort-cuda"] == (True, False)
    assert "onnxruntime-gpu 1.31.1 did not start its CUDA provider" in report.problems[0]
    assert onnx.load(opened[0]).graph.node


def test_two_onnxruntimes_are_a_problem_on_any_machine(machine: Machine) -> None:
    report = machine(packages={"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"})
    assert [line for line in report.problems if "overwrite each other's files" in line]


def test_plugins_that_do_not_run_keep_tensorrt_from_running(machine: Machine) -> None:
    report = machine(L4, plugin_problem="there are no kernels for sm89; build them")
    assert able(report)["trt-rtx"] == (True, False)
    assert report.problems == (
        "the plugins of TensorRT engines do not run here: there are no kernels for sm89; build them.",
    )


def test_plugins_are_asked_whether_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(host: Callable[[], Any]) -> str | None:
        entry = types.SimpleNamespace(load=lambda: host)
        monkeypatch.setattr("importlib.metadata.entry_points", lambda **_where: [entry])
        return doctor_backends._plugin_problem()

    def broken() -> Any:
        raise RuntimeError("no kernels.json\n  in a stack")

    assert answer(lambda: types.SimpleNamespace(problem=lambda _dtype, _gpu: "no kernels; build them")) == (
        "no kernels; build them"
    )
    assert answer(lambda: types.SimpleNamespace(problem=lambda _dtype, _gpu: None)) is None
    assert answer(broken) == "no kernels.json; install v4graph again"
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_where: [])
    assert "with `pip install -e .` in the checkout" in str(doctor_backends._plugin_problem())


def test_a_tensorrt_that_does_not_load_is_a_problem(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()

    def fail(_choice: str) -> Any:
        raise EngineError("TensorRT for RTX 1.2 is installed, v4graph needs 1.7 or later; upgrade it.")

    monkeypatch.setattr("v4graph.trt.load", fail)
    report = examine()
    assert able(report)["trt-rtx"] == (False, False)
    assert "TensorRT for RTX 1.2 is installed, v4graph needs 1.7 or later; upgrade it." in report.problems


def test_every_package_that_users_install_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {package.name: package for package in doctor_packages.find_packages()}
    for line in project["dependencies"]:
        name, _, oldest = line.partition(">=")
        assert (found[name].oldest, found[name].extras) == (oldest, ())
    for extra, lines in project["optional-dependencies"].items():
        names = [line.partition(">=")[0].partition("[")[0] for line in lines if ">=" in line]
        assert all((extra in found[name].extras) == (extra != "dev") for name in names if name in found)
        assert extra == "dev" or set(names) <= found.keys()
    assert "pytest" not in found


def test_installed_metadata_is_read_as_a_checkouts_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["click>=8.2", 'onnxruntime-gpu[cuda,cudnn]>=1.24; extra == "ort-gpu"', 'ruff>=1; extra == "dev"']
    monkeypatch.setattr(doctor_packages, "_requirements", lambda: lines)
    click, onnxruntime = doctor_packages.find_packages()
    assert (click.name, click.oldest, click.extras) == ("click", "8.2", ())
    assert (onnxruntime.name, onnxruntime.oldest, onnxruntime.extras) == (
        "onnxruntime-gpu",
        "1.24",
        ("ort-gpu",),
    )


def test_an_old_package_is_to_be_upgraded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_packages, "_version", lambda name: "2.5.1" if name == "torch" else "99")
    (problem,) = doctor_packages.package_problems(doctor_packages.find_packages())
    assert problem == (
        "torch 2.5.1 is installed, v4graph needs 2.11 or later; "
        "upgrade it with `pip install --upgrade 'v4graph[export]'`."
    )


def test_the_other_onnxruntime_is_to_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("v4graph.ort.installed", lambda: {"onnxruntime": "1.32.0"})
    monkeypatch.setattr(doctor_packages, "_version", lambda _name: None)
    fixes = {package.name: package.fix for package in doctor_packages.find_packages()}
    assert fixes["onnxruntime-gpu"] == "pip uninstall onnxruntime; pip install 'v4graph[ort-gpu]'"
    assert fixes["torch"] == "pip install 'v4graph[export]'"


def test_text_shows_what_json_holds(cli: Cli, machine: Machine) -> None:
    machine(L4)
    text, report = cli("doctor"), json.loads(cli("doctor", "--json").stdout)
    assert text.exit_code == 0, text.output
    assert report["gpus"] == [{"name": "NVIDIA L4", "target": "sm89", "memory_bytes": 24_000_000_000}]
    assert report["works"] is True
    lines = [" ".join(line.split()) for line in text.stdout.splitlines()]
    assert "GPU NVIDIA L4, sm89, 24.0 GB" in lines
    assert "driver runs CUDA 13.0 at most" in lines
    assert "trt-rtx 1.7.1 builds runs" in lines
    assert "portable Ampere and later built by trt-rtx runs by trt-rtx" in lines
    assert "sm89 Ada (L4, L40, RTX 40) built by trt-rtx runs by trt-rtx" in lines
    assert "sm120 Blackwell (RTX 50, RTX PRO 6000) built by trt-rtx -" in lines
    assert "problems:" not in lines


# Finders that do not see what only the extras bring, as on a machine with v4graph's requirements alone.
BARE = """
import re, sys
hidden = re.compile("(onnx|torch|tensorrt|cuda|tokenizers|huggingface|transformers|polygraphy|nvidia)")
class Bare:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if hidden.match(name) else self.finder.find_spec(name, path, target)
    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *_: ())(*context)
        return (one for one in found if not hidden.match(one.name))
sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
from v4graph.cli import main
main(["doctor"])
"""


def test_it_works_with_the_requirements_alone_and_exits_with_1() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}\n{BARE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "torch - pip install 'v4graph[export]'" in lines
    assert "ort-cpu - - - not installed: pip install 'v4graph[ort]'" in lines
    assert "trt-rtx - - - not installed: pip install 'v4graph[rtx]'" in lines
    assert (
        "no backend is installed; `pip install 'v4graph[ort]'` brings onnxruntime, "
        "`pip install 'v4graph[rtx]'` TensorRT for RTX, which builds without a GPU."
    ) in lines


def test_it_says_what_is_true_of_this_machine(cli: Cli) -> None:
    report = json.loads(cli("doctor", "--json").stdout)
    rows = {backend["name"]: backend for backend in report["backends"]}
    assert rows["ort-cpu"]["runs"]
    assert rows["trt-rtx"]["builds"] == trt.installed("tensorrt_rtx")
    if not report["gpus"]:
        assert not rows["trt-rtx"]["runs"]
