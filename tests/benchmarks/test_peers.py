"""The comparison with other engines: same weights, same logits, verdicts that follow from the times."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

import llama_side
import numpy as np
import peers
import pytest
import tiny
from click.testing import CliRunner
from engines import export_and_build
from peers_models import Claim, Contest
from peers_side import Round, SideProcess, SideSpec, Work

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.config import OFFICIAL, UNQUANTISED
from v4graph.errors import EngineError
from v4graph.numerics import dequantise_fp4
from v4graph_export import ExportOptions
from v4graph_runtime import Session, cpu_kernels
from v4graph_runtime.bench import Load, Timed

needs_llama = pytest.mark.skipif(bool(llama_side.missing()), reason=llama_side.missing())
SHORT = Load(prompt=8, context=4, tokens=4, rounds=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unquantised random weights of the tiny model."""
    path = tmp_path_factory.mktemp("plain") / "weights"
    init(tiny.config(), path, 0, weights=UNQUANTISED)
    return path


@pytest.fixture(scope="module")
def engine(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ExportOptions(numerics="exact", max_seq_len=384)
    return export_and_build(tmp_path_factory.mktemp("exact"), plain, options)


@needs_llama
def test_llama_cpp_gives_the_logits_of_exact_numerics(plain: Path, engine: Path, tmp_path: Path) -> None:
    """Every attention kind, hash and learned routing, YaRN, several compressed entries, a used session."""
    from gguf_checkpoint import write_gguf

    write_gguf(Checkpoint.open(plain), tmp_path / "f32.gguf", "f32")
    ours = Session(engine, Checkpoint.open(plain))
    theirs = llama_side.LlamaSession(tmp_path / "f32.gguf", capacity=384, threads=1, exact=True)
    ids = np.random.default_rng(7).integers(0, tiny.RAW["vocab_size"], (1, 300))
    for _ in range(2):
        ours.reset()
        theirs.reset()
        for begin, end in ((0, 1), (1, 200), *((i, i + 1) for i in range(200, 300))):
            expected, got = ours.prefill(ids[:, begin:end])[0], np.array(theirs.append(ids[:, begin:end]))
            np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=f"tokens {begin} to {end}")
    theirs.close()


@needs_llama
def test_the_quantised_file_holds_the_checkpoints_fp4_experts_unchanged(tmp_path: Path) -> None:
    import gguf
    from gguf_checkpoint import write_gguf

    init(tiny.config(), tmp_path / "weights", 0, weights=OFFICIAL)
    checkpoint = Checkpoint.open(tmp_path / "weights")
    write_gguf(checkpoint, tmp_path / "bf16.gguf", "bf16")
    llama_side.quantise(tmp_path / "bf16.gguf", tmp_path / "small.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors}
    assert tensors["blk.0.attn_q_b.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    found = tensors["blk.3.ffn_down_exps.weight"]
    assert found.tensor_type == gguf.GGMLQuantizationType.MXFP4
    experts = gguf.quants.dequantize(found.data, found.tensor_type)
    for e, expert in enumerate(experts):
        prefix = f"layers.3.ffn.experts.{e}.w2."
        codes, scale = checkpoint.array(prefix + "weight"), checkpoint.array(prefix + "scale")
        np.testing.assert_array_equal(expert, dequantise_fp4(codes, scale))


@needs_llama
def test_a_file_that_llama_cpp_does_not_load_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(EngineError, match=r"llama\.cpp does not load this file"):
        llama_side.LlamaSession(tmp_path / "no.gguf", capacity=16, threads=1)


def test_without_llama_cpp_one_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "no Python package llama_cpp and gguf here; `CMAKE_ARGS=" in llama_side.missing()


def contest(side: SideSpec, required: float) -> Contest:
    """The tiny model's engine against itself, and against a peer that is not there."""
    twin = SideSpec("twin", "v4graph", side.path, side.checkpoint)
    claims = (Claim("decode", side.name, ("twin",), required), Claim("decode", side.name, ("absent",), 1.0))
    return Contest("tiny", tiny.config(), (side, twin), (twin,), claims)


@pytest.mark.parametrize(("required", "verdict"), [(1e-3, "pass"), (1e3, "FAIL")])
def test_rounds_of_processes_become_a_table_rows_and_verdicts(
    plain: Path,
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    required: float,
    verdict: str,
) -> None:
    cpu_kernels.build_library(cpu_kernels.find_compiler())
    monkeypatch.setattr(peers, "QUIET", 1e9)
    side = SideSpec("ours", "v4graph", engine, plain)
    monkeypatch.setattr(peers, "MODELS", {"tiny": lambda *_: contest(side, required)})
    load = ("--prompt", "8", "--context", "4", "--tokens", "4", "--rounds", "1", "--threads", "1")
    result = CliRunner().invoke(peers.main, [*load, "--csv", str(tmp_path / "rows.csv")])
    assert result.exit_code == (0 if verdict == "pass" else 1), result.output
    lines = result.stdout.splitlines()
    assert any(line.startswith(f"{verdict}  decode of ours: ") for line in lines)
    assert "left out  decode of ours against absent" in lines
    assert any(line.startswith("pass  logits of ours and twin differ by at most 0.0e+00") for line in lines)
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["side"], row["prompt"]) for row in rows] == [
        ("tiny", "ours", "8"),
        ("tiny", "twin", "8"),
    ]


@pytest.mark.parametrize(("elsewhere", "holds", "code"), [(0.0, True, 0), (None, True, 0), (1.0, None, 1)])
def test_a_claim_holds_by_its_ratio_unless_a_side_was_disturbed(
    monkeypatch: pytest.MonkeyPatch, elsewhere: float | None, holds: bool | None, code: int
) -> None:
    result = peers.Result(
        contest(SideSpec("ours", "v4graph", Path("engine")), 2.0),
        {"ours": Timed(1.0, 0.5), "twin": Timed(3.0, 1.5)},
        {"ours": 0.0, "twin": elsewhere},
        {"twin": 0.0},
    )
    monkeypatch.setattr(peers, "MODELS", {"tiny": lambda *_: result.contest})
    monkeypatch.setattr(peers, "_compare", lambda *_: result)
    monkeypatch.setattr(cpu_kernels, "library_path", lambda: Path("library"))
    answer = CliRunner().invoke(peers.main, ["--json"])
    assert answer.exit_code == code
    found: dict[str, Any] = json.loads(answer.stdout)["models"][0]
    assert found["claims"][0]["ratio"] == pytest.approx(3.0)
    assert (found["claims"][0]["holds"], found["claims"][1]["ratio"]) == (holds, None)


def test_a_disturbed_round_is_run_again() -> None:
    answers = iter([1.0, 0.9, 0.0, 1.0])

    class Process:
        def round(self) -> Round:
            return Round(Timed(1.0, 1.0), next(answers))

    assert peers._quiet_round(Process()).elsewhere == 0.0


def test_a_side_that_does_not_open_is_refused_in_a_sentence(plain: Path) -> None:
    with pytest.raises(EngineError, match=r"^ours: nowhere"):
        SideProcess(SideSpec("ours", "v4graph", Path("nowhere"), plain), Work(SHORT, 40, 1))
