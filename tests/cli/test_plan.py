"""`v4graph plan`: text, JSON, page, exit codes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Cli = Callable[..., Result]
HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx", "matplotlib")


@pytest.fixture
def plan(cli: Cli) -> Cli:
    """Run `v4graph plan` and check its exit code."""

    def run(*arguments: object, code: int = 0) -> Result:
        result = cli("plan", *arguments)
        assert result.exit_code == code, result.output
        return result

    return run


def test_the_text_names_what_does_not_fit_and_what_would(plan: Cli) -> None:
    text = plan("flash").stdout
    assert "159,609,485,896 bytes" in text
    assert "284.3B, 13.27B of them per token" in text
    assert "does not fit: 164.8 GB for the model and a GPU has 141 GB" in text
    assert "147.2 GB in host memory, 3.4 GB of it cross per token" in text
    assert "773 launches" in text
    assert "multi-token prediction 6.610B more" in text


def test_a_plan_that_does_not_fit_what_was_asked_for_exits_1(plan: Cli) -> None:
    assert plan("flash", "--gpus", "1", code=1).stdout
    assert plan("flash", "--gpus", "2").stdout


def test_json_has_the_figures_and_marks_estimates(plan: Cli) -> None:
    report = json.loads(
        plan("pro", "--gpu", "b200", "--gpus", "8", "--batch", "16", "--context", "128K",
            "--kv-cache", "fp8", "--price", "6", "--json").stdout
    )  # fmt: skip
    assert report["checkpoint"]["bytes"] == 864_704_792_696
    assert (report["model"]["context"], report["model"]["index_keys"]) == (131072, "fp4")
    assert report["model"]["caches_exist"] is False
    assert report["placement"]["fits"] is True
    row = report["estimates"]["rows"][0]
    dollars = 6 * row["gpus"] / 3600 * 1e6 / row["tokens_per_second"]
    assert row["usd_per_million_output"] == pytest.approx(dollars)
    assert report["estimates"]["api_prices"] == {"flash": [0.14, 0.28], "pro": [1.74, 3.48]}


def test_caches_that_do_not_exist_are_marked_beside_those_that_do(plan: Cli) -> None:
    lines = plan("flash", "--kv-cache", "fp8", "--gpus", "2").stdout.splitlines()
    assert any("predicted: no graph holds such caches yet" in line for line in lines)
    rows = {tuple(line.split()[:2]): line for line in lines if "%" in line and "GB" in line}
    assert "predicted" in rows["fp8", "fp4"]
    assert "7.31%" in rows["fp8", "fp4"]
    assert "predicted" not in rows["bf16", "bf16"]


def test_an_unquantised_checkpoint_is_planned_as_it_would_be_packed(plan: Cli, tmp_path: Path) -> None:
    raw = json.loads((Path(__file__).parents[2] / "v4graph" / "presets" / "flash.config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = plan(tmp_path).stdout
    assert "as `v4graph pack --quantize` would write it" in text
    assert "159,609,485,896 bytes" in text


def test_a_model_that_the_kernels_do_not_take_is_planned_with_a_warning(plan: Cli, tmp_path: Path) -> None:
    raw = json.loads((Path(__file__).parents[2] / "v4graph" / "presets" / "nano.config.json").read_text())
    raw |= {"head_dim": 128, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    text = plan(tmp_path, "--context", "2K").stdout
    assert "no kernel for this model, so launches and workspace are lower bounds: V4" in text
    assert "the kernels are for head_dim 512" in text


def test_the_page_stands_alone(plan: Cli, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    plan("nano", "--context", "2K", "--html", page)
    text = page.read_text()
    assert text.count("<svg") == 1
    for name in ("V4-Flash, packed rows", "V4-Pro, bf16 rows", "V3.2", "this model"):
        assert name in text
    assert "<script" not in text
    assert "src=" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["plan.html"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--context", "2M"), "beyond the model's max_position_embeddings of 1,048,576"),
        (("--context", "0"), "--context is 0, expected at least 1"),
        (("--batch", "0"), "--batch is 0, expected at least 1"),
        (("--context", "lots"), "'lots' is not a number of tokens; give one like 8192, 128K or 1M"),
        (("--gpu", "h201"), "no such GPU; did you mean 'h20' or 'h200'"),
        (("--gpu", "none.toml"), "--gpu none.toml: cannot be read"),
        (("--gpus", "0"), "0 GPUs hold nothing"),
        (("--compute-share", "2"), "2.0 is no share"),
        (("--disk", "0"), "--disk must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(plan: Cli, args: tuple[str, str], message: str) -> None:
    assert message in plan("flash", *args, code=2).stderr


def test_gpus_are_listed(plan: Cli) -> None:
    lines = plan("--list-gpus").stdout.splitlines()
    assert any(line.startswith("h200") and "4800 GB/s" in line for line in lines)


def test_nothing_heavy_is_loaded() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from v4graph.cli import main\n"
        "main(['plan', 'pro', '--json'], standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
