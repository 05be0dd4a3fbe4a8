"""What the TensorRT backend puts on the GPU, and how it frees it."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trt import Kernels, Validity
from toy_engine import VOCAB, WIDTH, ToyWeights
from toy_trt import RECORD, ToyMachine, change, write_engine

from v4graph.errors import EngineError
from v4graph.manifest import Manifest
from v4graph_runtime import Session
from v4graph_runtime.state import state_tensors
from v4graph_runtime.trt_backend import TrtOptions


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "engine")


@pytest.fixture
def toy(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    return ToyMachine.of(engine_dir).install(monkeypatch)


class Lazy:
    """Weights that exist only while somebody holds them."""

    def __init__(self) -> None:
        self.most = 0

    def bound(self, manifest: Manifest) -> Iterator[tuple[str, Any]]:
        alive: list[weakref.ref[Any]] = []
        for binding in manifest.bindings:
            array = np.ones(binding.shape, np.float32)
            alive.append(weakref.ref(array))
            self.most = max(self.most, sum(ref() is not None for ref in alive))
            yield binding.input, array
            del array


def test_weights_are_uploaded_once_and_one_at_a_time(engine_dir: Path, toy: ToyMachine) -> None:
    weights = Lazy()
    with Session(engine_dir, weights, batch=2) as session:
        assert len(toy.device.uploads) == 2
        assert weights.most == 1
        addresses = set(toy.device.uploads)
        session.prefill([[1] * 12] * 2)
        session.decode([1, 2])
        assert not addresses & set(toy.device.uploads[2:])
        for context in toy.trt.contexts:
            assert {context.addresses[f"{name}.weight"] for name in ("embed", "head")} == addresses


def test_a_state_and_its_next_value_have_one_address_in_every_context(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights
) -> None:
    with Session(engine_dir, weights, batch=2) as session:
        session.prefill([[1] * 12] * 2)
        assert len(toy.trt.contexts) == 2
        for name in ("window", "compressed"):
            addresses = {
                c.addresses[f"{side}.0.{name}"] for c in toy.trt.contexts for side in ("state", "next")
            }
            assert len(addresses) == 1
        assert session.state_bytes == sum(s.nbytes for s in state_tensors(session.manifest, 2))


def test_states_begin_as_zeros(engine_dir: Path, toy: ToyMachine, weights: ToyWeights) -> None:
    with Session(engine_dir, weights):
        toy.device.synchronize()
        (context,) = toy.trt.contexts
        for state in state_tensors(Manifest.load(engine_dir), 1):
            assert not toy.device.view(context.addresses[state.name], state.shape, "f4").any()


def test_plugins_are_registered_and_given_a_launcher(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights
) -> None:
    with Session(engine_dir, weights):
        assert toy.host.registered is toy.trt
        assert toy.host.launcher == ("float32", "sm89", None)


def test_only_the_captured_context_compiles_for_its_shapes_at_once(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights
) -> None:
    with Session(engine_dir, weights) as session:
        session.prefill([[1, 2, 3]])
        kinds = [c.config.dynamic_shapes_kernel_specialization_strategy for c in toy.trt.contexts]
        assert kinds == [Kernels.EAGER, Kernels.LAZY]


def test_compiled_kernels_are_kept_beside_the_plan(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights
) -> None:
    path = engine_dir / "runtime.cache"
    with Session(engine_dir, weights) as session:
        session.prefill([[1, 2, 3]])
        assert path.read_bytes() == b"kernels 1"
        session.prefill([[4, 5, 6]])
    assert path.read_bytes() == b"kernels 2"
    with Session(engine_dir, weights) as session:
        session.prefill([[1, 2, 3]])
    assert path.read_bytes() == b"kernels 3"
    assert sorted(p.name for p in engine_dir.iterdir() if "cache" in p.name) == ["runtime.cache"]


@pytest.mark.parametrize("option", [False, True])
def test_a_cache_of_another_machine_is_replaced_and_an_unwanted_one_is_left_alone(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights, option: bool
) -> None:
    path = engine_dir / "runtime.cache"
    path.write_bytes(b"another driver's")
    with Session(engine_dir, weights, options=TrtOptions(runtime_cache=option)) as session:
        session.prefill([[1, 2, 3]])
    assert path.read_bytes() == (b"kernels 1" if option else b"another driver's")


def test_a_folder_that_cannot_be_written_costs_a_warning(
    engine_dir: Path,
    toy: ToyMachine,
    weights: ToyWeights,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with Session(engine_dir, weights) as session:
        session.prefill([[1, 2, 3]])
    assert "cannot be written (Read-only file system)" in caplog.text


def test_closing_frees_the_gpu(engine_dir: Path, toy: ToyMachine, weights: ToyWeights) -> None:
    session = Session(engine_dir, weights)
    for token in range(4):
        session.decode([token])
    assert toy.device.live_graphs == 1
    session.close()
    session.close()
    assert toy.device.closed
    assert toy.device.live_graphs == 0
    assert not toy.device.blocks


def test_a_forgotten_session_frees_the_gpu(engine_dir: Path, toy: ToyMachine, weights: ToyWeights) -> None:
    session = Session(engine_dir, weights)
    session.decode([1])
    del session
    gc.collect()
    assert toy.device.closed


@pytest.mark.parametrize("broken", ["deserialize", "context", "profile"])
def test_a_plan_that_does_not_open_is_told_first_in_our_words_and_frees_the_gpu(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights, broken: str
) -> None:
    toy.trt.broken = broken
    with pytest.raises(EngineError) as error:
        Session(engine_dir, weights)
    ours, theirs = str(error.value).splitlines()
    assert {
        "deserialize": "model.plan: TensorRT for RTX 1.7.1.116 (as asked) cannot load it.",
        "context": "model.plan: TensorRT cannot make an execution context.",
        "profile": "TensorRT refuses optimization profile 0.",
    }[broken] in ours
    assert theirs.startswith("TensorRT: ")
    assert toy.device.closed


def test_a_plan_that_tensorrt_calls_invalid_is_refused_with_its_reasons(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights
) -> None:
    toy.trt.validity = (Validity.INVALID, 2 | 4)
    with pytest.raises(EngineError, match=r"it cannot run here \(unsupported cc, old cuda driver\)"):
        Session(engine_dir, weights)


def test_a_plan_that_runs_slower_here_is_run_with_a_warning(
    engine_dir: Path, toy: ToyMachine, weights: ToyWeights, caplog: pytest.LogCaptureFixture
) -> None:
    toy.trt.validity = (Validity.SUBOPTIMAL, 2)
    Session(engine_dir, weights).close()
    assert "it will run slower here (unsupported cc)" in caplog.text


def test_what_does_not_fit_is_refused_before_any_upload(
    engine_dir: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = ToyMachine.of(engine_dir, memory=5000).install(monkeypatch)
    states = sum(state.nbytes for state in state_tensors(Manifest.load(engine_dir), 4))
    weight_bytes = 2 * VOCAB * WIDTH * 4
    with pytest.raises(EngineError) as error:
        Session(engine_dir, weights, batch=4)
    assert str(error.value).startswith(
        f"the GPU has 5,000 bytes free, the session takes {states + weight_bytes + 1000:,} "
        f"(weights {weight_bytes:,}, states {states:,}, scratch 1,000); open the session with a smaller batch"
    )
    assert toy.device.uploads == []
    assert toy.device.closed


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((VOCAB, WIDTH + 1), np.float32),
            r"is float32 \[23, 9\], the engine takes float32 \[23, 8\]",
        ),
        (np.zeros((VOCAB, WIDTH), np.int8), r"is int8 \[23, 8\], the engine takes float32 \[23, 8\]"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_a_weight_of_another_shape_or_dtype_is_refused(
    engine_dir: Path, weights: ToyWeights, array: Any, message: str
) -> None:
    with pytest.raises(EngineError, match=r"weight 'head\.weight' " + message):
        Session(engine_dir, ToyWeights({**weights.arrays, "head.weight": array}))


@pytest.mark.usefixtures("toy")
def test_a_weight_that_the_checkpoint_does_not_give_is_named(engine_dir: Path, weights: ToyWeights) -> None:
    class Half:
        def bound(self, manifest: Manifest) -> Any:
            return list(weights.bound(manifest))[:1]

    with pytest.raises(EngineError, match=r"gives no array for weight input 'head\.weight'"):
        Session(engine_dir, Half())


def test_a_plan_with_other_inputs_than_the_manifest_is_refused(
    engine_dir: Path, weights: ToyWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(engine_dir, bindings=Manifest.load(engine_dir).bindings[:1], tensorrt=RECORD)
    ToyMachine.of(engine_dir).install(monkeypatch)
    with pytest.raises(EngineError, match=r"the plan has input 'head\.weight', the manifest has not"):
        Session(engine_dir, weights)
