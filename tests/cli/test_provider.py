"""--provider of run and eval: on a machine without a GPU it says why, and with one it is taken."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from cuda_ort import install, plain_module, working_module

from v4graph.manifest import Manifest

Cli = Callable[..., Result]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("In the beginning was the Word.\n")
    return file


def test_cuda_without_a_gpu_is_one_line_and_no_text(
    cli: Cli, engine: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    install(monkeypatch, plain_module(), gpus=(), driver=None)
    where = (engine, "--checkpoint", checkpoint, "--provider", "cuda")
    for arguments in (("run", *where, "--prompt", "And"), ("eval", *where, "--text", text)):
        result = cli(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "Error: onnxruntime cannot run on CUDA here: no NVIDIA GPU with a working driver is found; "
            "install NVIDIA's driver if there is a GPU; or run with --provider cpu.\n"
        )


def test_cuda_gives_the_text_and_the_score_of_the_cpu(
    cli: Cli, engine: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, device = working_module()
    install(monkeypatch, module)
    run = ("run", engine, "--checkpoint", checkpoint, "--prompt", "In the", "--max-new-tokens", 4)
    evaluate = ("eval", engine, "--checkpoint", checkpoint, "--text", text)
    for command in (run, evaluate):
        on_cpu = cli(*command)
        assert on_cpu.exit_code == 0, on_cpu.output
        assert cli(*command, "--provider", "cpu").stdout == on_cpu.stdout
        assert not device.uploads
        assert cli(*command, "--provider", "cuda").stdout == on_cpu.stdout
        assert device.uploads
        device.uploads.clear()


@pytest.mark.parametrize("option", [("--provider", "cuda"), ("--threads", 2)])
def test_options_of_onnxruntime_are_refused_for_another_backend(
    cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path, option: tuple[str, object]
) -> None:
    other = Path(shutil.copytree(engine, tmp_path / "other"))
    dataclasses.replace(Manifest.load(engine), backend="trt").save(other)
    result = cli("run", other, "--checkpoint", checkpoint, "--prompt", "And", *option)
    assert result.exit_code == 2
    message = f"{option[0]} is onnxruntime's, {other} is built with --backend trt; leave it out."
    assert message in " ".join(result.stderr.split())


def test_an_unknown_provider_is_a_usage_error(cli: Cli, engine: Path) -> None:
    result = cli("run", engine, "--prompt", "And", "--provider", "rocm")
    assert result.exit_code == 2
    assert "'rocm' is not one of 'cpu', 'cuda'" in result.stderr
