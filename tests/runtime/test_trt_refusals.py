"""What keeps a TensorRT engine from running, each as the sentence that the user reads."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_engine import ToyWeights
from toy_trt import MAX_BATCH, RECORD, FakeHost, ToyMachine, change, write_engine

from v4graph.errors import EngineError, SessionError
from v4graph.gpu import Gpu
from v4graph.manifest import Manifest
from v4graph.trt import TensorRT
from v4graph_runtime import OrtOptions, Session, TrtOptions, trt_checks

BLACKWELL = Gpu("RTX 5090", "sm120", 1)
HOPPER = Gpu("NVIDIA H200", "sm90", 1)


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


@pytest.fixture
def toy(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    return ToyMachine.of(engine_dir).install(monkeypatch)


@pytest.fixture
def refusal(engine_dir: Path, toy: ToyMachine, weights: ToyWeights) -> Callable[..., str]:
    """Open the engine and return why not, its path written as DIR; the GPU is never taken."""

    def open_engine(**options: Any) -> str:
        with pytest.raises((EngineError, SessionError)) as error:
            Session(engine_dir, weights, **options)
        assert not toy.device.active
        return str(error.value).replace(str(engine_dir), "DIR")

    return open_engine


REBUILD = (
    "build it again with `v4graph build GRAPH_DIR DIR --backend trt --target sm89 --target sm120 "
    "--tensorrt rtx`"
)


@pytest.mark.parametrize("name", ["model.plan", "config.json"])
def test_a_changed_file_is_refused(engine_dir: Path, refusal: Callable[..., str], name: str) -> None:
    with (engine_dir / name).open("ab") as file:
        file.write(b" ")
    assert refusal() == f"DIR: {name} was changed after it was built (sha256 differs); {REBUILD}."


@pytest.mark.parametrize("name", ["model.plan", "config.json"])
def test_a_missing_file_is_refused(engine_dir: Path, refusal: Callable[..., str], name: str) -> None:
    (engine_dir / name).unlink()
    assert refusal() == f"DIR: {name} is missing; {REBUILD}."


def test_a_changed_config_is_refused(engine_dir: Path, refusal: Callable[..., str]) -> None:
    change(engine_dir, config=Manifest.load(engine_dir).config | {"rope_theta": 1e6})
    assert refusal() == (
        f"DIR: the config in manifest.json was changed after it was built (sha256 differs); {REBUILD}."
    )


def test_an_op_of_another_version_is_refused(engine_dir: Path, refusal: Callable[..., str]) -> None:
    change(engine_dir, ops={"V4MoE": 99})
    assert refusal() == (
        "DIR: made with op V4MoE version 99, this v4graph has version 1; export again with `v4graph export` "
        "and build again with `v4graph build GRAPH_DIR DIR --backend trt --target sm89 --target sm120`."
    )


def test_a_plugin_that_is_not_the_one_built_with_is_refused(
    toy: ToyMachine, refusal: Callable[..., str]
) -> None:
    toy.host.known = {"V4WindowAttention": "2" * 64}
    assert refusal() == (
        "DIR: built with plugin V4WindowAttention 111111111111, the installed one is 222222222222 (its "
        f"contract or launch plan changed); {REBUILD}."
    )


def test_a_plugin_that_is_missing_is_refused(toy: ToyMachine, refusal: Callable[..., str]) -> None:
    toy.host.known = {}
    assert refusal() == (
        f"DIR: built with a plugin for V4WindowAttention, which the installed plugins do not have; {REBUILD}."
    )


def test_without_plugins_installed_the_package_is_named(
    toy: ToyMachine, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.install(monkeypatch, host=None)
    assert refusal() == (
        "DIR: has 1 ops as plugins, and no plugins are installed here (entry point v4graph.plugins); install "
        "v4graph again with `pip install 'v4graph[rtx]'`."
    )


def test_plugins_that_cannot_run_say_why(toy: ToyMachine, refusal: Callable[..., str]) -> None:
    toy.host.trouble = "its kernels are not compiled; run `make kernels`"
    assert refusal() == "DIR: its kernels are not compiled; run `make kernels`."


def test_plugins_are_asked_about_this_gpu_and_the_kernels_that_the_engine_ships(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights
) -> None:
    Session(engine_dir, weights).close()
    assert toy.host.asked == ("float32", "sm89", None)
    (engine_dir / "kernels").mkdir()
    Session(engine_dir, weights).close()
    assert toy.host.asked == ("float32", "sm89", engine_dir / "kernels")


def test_an_op_that_updates_a_state_needs_its_plugin(engine_dir: Path, refusal: Callable[..., str]) -> None:
    change(engine_dir, tensorrt=dataclasses.replace(RECORD, bodies=("V4HyperPre", "V4Compress")))
    assert refusal() == (
        "DIR: built with --no-plugin V4Compress, whose body does not update its state in place, as a session "
        f"needs; {REBUILD}, without that option."
    )


def test_an_op_without_state_may_be_a_body(engine_dir: Path, toy: ToyMachine, weights: ToyWeights) -> None:
    change(engine_dir, tensorrt=dataclasses.replace(RECORD, bodies=("V4HyperPre",), plugins=()))
    Session(engine_dir, weights).close()
    assert toy.host.registered is None


def test_a_machine_without_a_gpu_is_told_what_it_can_do(
    toy: ToyMachine, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.install(monkeypatch, gpus=(), driver=None)
    text = refusal()
    assert text.startswith("DIR: no NVIDIA GPU")
    assert text.endswith(
        "; this machine can build engines but not run them, so run the model with one built with "
        "--backend ort meanwhile."
    )


def test_a_driver_that_is_too_old_is_named(
    toy: ToyMachine, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.install(monkeypatch, driver=(12, 9))
    assert refusal() == (
        "DIR: TensorRT for RTX 1.7.1.116 is built for CUDA 13, the driver runs CUDA 12.9 at most; install "
        "NVIDIA's driver 580 or later."
    )


@pytest.mark.parametrize(
    ("gpu", "options"),
    [
        (Gpu("RTX 3090", "sm86", 1), "--target sm86 --tensorrt rtx"),
        (Gpu("a later one", "sm130", 1), "--target portable --tensorrt rtx"),
        # TensorRT for RTX has no target for these two, and its portable plans do not run on them.
        (Gpu("NVIDIA H200", "sm90", 1), "--target sm90 --tensorrt full"),
        (Gpu("T4", "sm75", 1), "--target sm75 --tensorrt full"),
    ],
)
def test_a_gpu_that_is_no_target_is_refused_with_a_build_that_is_for_it(
    toy: ToyMachine, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, gpu: Gpu, options: str
) -> None:
    toy.install(monkeypatch, gpus=(BLACKWELL, gpu))
    assert refusal(options=TrtOptions(device=1)) == (
        f"DIR: built for sm89, sm120, GPU 1 is {gpu.target} ({gpu.name}); build it again with "
        f"`v4graph build GRAPH_DIR DIR --backend trt {options}`."
    )


def test_a_portable_plan_runs_on_the_gpus_that_its_tensorrt_knows(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(engine_dir, tensorrt=dataclasses.replace(RECORD, targets=("portable",)))
    toy.install(monkeypatch, gpus=(Gpu("RTX 3090", "sm86", 1),))
    Session(engine_dir, weights).close()
    for gpu in (HOPPER, Gpu("T4", "sm75", 1)):
        toy.install(monkeypatch, gpus=(gpu,))
        with pytest.raises(EngineError, match=f"built for portable, GPU 0 is {gpu.target}"):
            Session(engine_dir, weights)


@pytest.mark.parametrize("index", [1, -1])
def test_a_gpu_that_does_not_exist_is_refused(refusal: Callable[..., str], index: int) -> None:
    text = refusal(options=TrtOptions(device=index))
    assert text == f"GPU {index} does not exist, this process sees 1; choose 0 to 0."


@pytest.mark.parametrize("version", ["1.7.2.9", "1.8.0.1", "2.0.0"])
def test_another_tensorrt_version_is_refused(
    toy: ToyMachine, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    toy.install(monkeypatch, load=lambda _: TensorRT(toy.trt, "tensorrt_rtx", version, "as asked"))
    assert refusal() == (
        f"DIR: built with TensorRT for RTX 1.7.1.116, {version} is installed, and a plan runs on the version "
        f"that built it only; {REBUILD}, or `pip install 'tensorrt-rtx-cu13-libs==1.7.1.*' "
        "'tensorrt-rtx-cu13-bindings==1.7.1.*'`."
    )


def test_another_build_of_the_version_is_accepted(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.install(monkeypatch, load=lambda _: TensorRT(toy.trt, "tensorrt_rtx", "1.7.1.200", "as asked"))
    with Session(engine_dir, weights) as session:
        assert session.position.tolist() == [0]


def test_a_tensorrt_that_is_not_installed_is_named_with_what_needs_it(
    toy: ToyMachine, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(choice: str) -> TensorRT:
        raise EngineError(f"TensorRT ({choice}) is not installed; install it.")

    toy.install(monkeypatch, load=missing)
    assert refusal() == (
        "DIR: built with TensorRT for RTX 1.7.1.116: TensorRT (rtx) is not installed; install it."
    )


def test_the_other_tensorrt_cannot_be_asked_for(refusal: Callable[..., str]) -> None:
    assert refusal(options=TrtOptions(tensorrt="full")) == (
        "DIR: built with TensorRT for RTX 1.7.1.116, 'full' is asked for; a plan runs on the TensorRT that "
        "built it only, so leave the choice out."
    )


def test_more_slots_than_the_profiles_hold_are_refused(refusal: Callable[..., str]) -> None:
    assert refusal(batch=MAX_BATCH + 1) == (
        "batch is 5, profile 'decode' of the engine takes 1 to 4; build it again with `v4graph build "
        "--backend trt --max-batch-size 5`, or open fewer slots."
    )


def test_options_of_onnxruntime_are_refused(refusal: Callable[..., str]) -> None:
    assert refusal(options=OrtOptions()) == (
        "DIR: built for backend 'trt', which takes TrtOptions, not OrtOptions."
    )


def test_a_wrong_checkpoint_is_refused_before_the_gpu_is_taken(engine_dir: Path, toy: ToyMachine) -> None:
    class Wrong:
        def bound(self, manifest: Manifest) -> Any:
            raise EngineError("no tensor embed.weight")

    with pytest.raises(EngineError, match=r"no tensor embed\.weight"):
        Session(engine_dir, Wrong())
    assert not toy.device.active


def test_this_machine_is_looked_at_without_taking_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    host = FakeHost()
    monkeypatch.setattr(trt_checks, "find_host", lambda: host)
    monkeypatch.setattr(trt_checks.gpu, "gpus", lambda: (HOPPER,))
    monkeypatch.setattr(trt_checks.gpu, "driver_version", lambda: (13, 0))
    machine = trt_checks.this_machine()
    assert (machine.gpus, machine.driver, machine.host) == ((HOPPER,), (13, 0), host)
