"""The kernel bundle: compiled the same everywhere, only what changed, refused where it breaks a limit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from v4graph.cli import main
from v4graph.errors import EngineError
from v4graph.launch import ALL_PLANS
from v4graph_plugins.bundle import ARCHITECTURES, Compiler, build_bundle, find_nvcc
from v4graph_plugins.emulator import KERNELS
from v4graph_plugins.kernel_files import KernelFiles, sha256
from v4graph_plugins.kernel_gates import problems

UNITS = ("norm", "prep")


def quiet(_stage: str, _done: int, _total: int) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    try:
        return find_nvcc()
    except EngineError as error:
        pytest.skip(str(error))


def some_sources(folder: Path) -> Path:
    """Two units of the real sources, elsewhere."""
    folder.mkdir()
    for path in (*KERNELS.glob("*.cuh"), *(KERNELS / f"{unit}.cu" for unit in UNITS)):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def bundle(compiler: Compiler, tmp_path_factory: pytest.TempPathFactory) -> KernelFiles:
    folder = tmp_path_factory.mktemp("bundle")
    return build_bundle(("sm80", "sm120"), compiler, quiet, folder / "out", some_sources(folder / "sources"))


def test_every_target_has_every_unit_with_its_hash(bundle: KernelFiles) -> None:
    assert bundle.targets == ("sm80", "sm120", "portable")
    for target in bundle.targets:
        for unit in UNITS:
            path = bundle.file(target, unit)
            assert path.suffix == (".ptx" if target == "portable" else ".cubin")
            assert bundle.index["targets"][target]["files"][unit]["sha256"] == sha256(path)


def test_the_index_tells_what_the_compiler_and_the_ptx_say(bundle: KernelFiles) -> None:
    assert bundle.index["ptx_isa"] == "9.0"
    assert bundle.signature("norm.v4_rms_norm") == "pppif"
    assert bundle.index["kernels"]["norm.v4_rms_norm"]["threads"] == 128
    used = bundle.index["targets"]["sm80"]["files"]["norm"]["resources"]["v4_rms_norm"]
    assert 16 <= used["registers"] <= 64
    assert used["spill_stores"] == 0


def test_the_plans_are_in_the_bundle_for_hosts_without_python(bundle: KernelFiles) -> None:
    plans = json.loads((bundle.folder / "plans.json").read_text())
    assert plans == json.loads(json.dumps([plan.as_json() for plan in ALL_PLANS]))


def test_another_folder_gives_the_same_bytes(bundle: KernelFiles, compiler: Compiler, tmp_path: Path) -> None:
    sources = some_sources(tmp_path / "a folder with another name")
    again = build_bundle(("sm80", "sm120"), compiler, quiet, tmp_path / "out", sources)
    assert again.index == bundle.index
    assert (tmp_path / "out" / "index.json").read_bytes() == (bundle.folder / "index.json").read_bytes()


def test_only_what_changed_is_compiled_again(compiler: Compiler, tmp_path: Path) -> None:
    sources, compiled = some_sources(tmp_path / "sources"), list[str]()

    def build(*targets: str) -> KernelFiles:
        compiled.clear()
        return build_bundle(
            targets, compiler, lambda stage, *_: compiled.append(stage), tmp_path / "out", sources
        )

    build("sm80")
    assert sorted(compiled) == [
        "portable/norm.ptx",
        "portable/prep.ptx",
        "sm80/norm.cubin",
        "sm80/prep.cubin",
    ]
    assert build("sm80").targets == ("sm80", "portable")
    assert compiled == []
    (sources / "norm.cu").write_text((sources / "norm.cu").read_text() + "// changed\n")
    build("sm80")
    assert sorted(compiled) == ["portable/norm.ptx", "sm80/norm.cubin"]
    (tmp_path / "out" / "sm80" / "prep.cubin").write_bytes(b"damaged")
    build("sm80")
    assert compiled == ["sm80/prep.cubin"]
    assert build("sm86").targets == ("sm80", "sm86", "portable")
    (sources / "norm.cu").write_text((sources / "norm.cu").read_text() + "// changed again\n")
    assert build("sm86").targets == ("sm80", "sm86", "portable")
    assert "norm" not in build("sm86").index["targets"]["sm80"]["files"]


def test_a_source_that_does_not_compile_is_named(compiler: Compiler, tmp_path: Path) -> None:
    sources = some_sources(tmp_path / "sources")
    (sources / "norm.cu").write_text('#include "device.cuh"\nV4_KERNEL(v4_bad, 32, 1, float* x) { y = 1; }\n')
    with pytest.raises(EngineError, match=r"norm\.cu: nvcc refuses it for ") as found:
        build_bundle(("sm80",), compiler, quiet, tmp_path / "out", sources)
    assert 'identifier "y" is undefined' in found.value.detail
    assert not (tmp_path / "out" / "index.json").exists()


def change(bundle: KernelFiles, edit: Callable[[dict[str, object]], object]) -> KernelFiles:
    index = json.loads(json.dumps(bundle.index))
    edit(index)
    return KernelFiles(bundle.folder, index)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (
            lambda i: i["targets"]["sm80"]["files"]["norm"]["resources"]["v4_rms_norm"].update(spill_loads=8),
            "norm.v4_rms_norm: moves 8 bytes of spilled registers on sm80",
        ),
        (lambda i: i.update(ptx_isa="9.1"), "PTX ISA 9.1, drivers of CUDA 13.0 take 9.0"),
        (
            lambda i: i["kernels"]["norm.v4_rms_norm"].update(arguments="ppp"),
            "norm.v4_rms_norm: takes (ppp), its plan passes (pppif)",
        ),
        (
            lambda i: i["kernels"]["norm.v4_rms_norm"].update(threads=64),
            "norm.v4_rms_norm: launched with 128 threads, compiled for another number",
        ),
        (
            lambda i: i["kernels"].pop("norm.v4_rms_norm"),
            "V4RmsNorm: its plan launches norm.v4_rms_norm, which is not in the bundle",
        ),
    ],
)
def test_gates_name_what_is_wrong(bundle: KernelFiles, edit: Callable[..., object], text: str) -> None:
    assert text not in problems(bundle)
    assert text in problems(change(bundle, edit))


def test_kernels_are_chosen_as_gpus_run_them() -> None:
    def target_for(gpu: str, *targets: str) -> str | None:
        index = {"format": 1, "kernels": {}, "ptx_isa": "9.0", "targets": {t: {"files": {}} for t in targets}}
        return KernelFiles(Path(), index).target_for(gpu)

    assert target_for("sm89", "sm80", "sm86", "sm89", "portable") == "sm89"
    assert target_for("sm87", "sm80", "sm86", "sm89", "portable") == "sm86"
    assert target_for("sm90", "sm80", "sm89", "portable") == "portable"
    assert target_for("sm103", "sm100", "sm120", "portable") == "portable"
    assert target_for("sm121", "sm120") is None
    assert target_for("sm75", "sm80", "portable") is None


def test_nvcc_that_is_missing_or_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'release 12.4, V12.4.99'\n")
    nvcc.chmod(0o755)
    with pytest.raises(EngineError, match=r"nvcc 12\.4\.99, compiling the kernels needs 13\.0 or newer"):
        find_nvcc(str(tmp_path))
    monkeypatch.setattr("v4graph_plugins.bundle.shutil.which", lambda _name: None)
    monkeypatch.setattr("v4graph_plugins.bundle.Path.is_file", lambda _path: False)
    with pytest.raises(
        EngineError, match=r"needs nvcc 13\.0 or newer, and none was found in CUDA_HOME, PATH"
    ):
        find_nvcc()


def test_an_unknown_target_answers_with_the_known_ones(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["kernels", "build", "sm91", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--target sm91: no such target; did you mean" in result.output
    assert ", ".join(ARCHITECTURES) in result.output


def test_list_without_a_bundle_says_how_to_compile_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["kernels", "list", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "no kernels are compiled here; compile them with `v4graph kernels build`." in result.output


def test_list_prints_a_row_per_kernel(bundle: KernelFiles) -> None:
    result = CliRunner().invoke(main, ["kernels", "list", "--out", str(bundle.folder)])
    assert result.exit_code == 0
    assert result.output.startswith("| kernel | parameters | threads | sm80 | sm120 |\n")
    assert "| norm.v4_rms_norm | pppif | 128 | " in result.output
    assert json.loads(
        CliRunner().invoke(main, ["kernels", "list", "--out", str(bundle.folder), "--json"]).output
    ) == dict(bundle.index)
