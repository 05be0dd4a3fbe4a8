"""Each command on a small random checkpoint: what it prints, as text and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Cli = Callable[..., Result]


def test_run_is_reproducible_and_streams_what_json_holds(cli: Cli, engine: Path, checkpoint: Path) -> None:
    command = ("run", engine, "--checkpoint", checkpoint, "--prompt", "In the beginning")
    options = ("--max-new-tokens", 8, "--temperature", 0.8, "--seed", 3)
    text = cli(*command, *options)
    assert text.exit_code == 0, text.output
    result = cli(*command, *options, "--json")
    report = json.loads(result.stdout)
    assert text.stdout == f"In the beginning{report['text']}\n"
    assert text.stderr.startswith("8 tokens (length), ")
    assert len(report["ids"]) == report["new_tokens"] == 8
    assert report["state_bytes"] > 0
    assert result.stderr == ""


def test_run_stops_at_a_text(cli: Cli, engine: Path, checkpoint: Path) -> None:
    command = ("run", engine, "--checkpoint", checkpoint, "--prompt", "And", "--max-new-tokens", 8, "--json")
    text = json.loads(cli(*command).stdout)["text"]
    report = json.loads(cli(*command, "--stop", "never there", "--stop", text[2:4]).stdout)
    assert (report["text"], report["finish"]) == (text[: text.index(text[2:4])], "stop")


def test_run_matches_a_pattern_or_a_schema(cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = ("run", engine, "--checkpoint", checkpoint, "--prompt", "And", "--max-new-tokens", 40, "--json")
    report = json.loads(cli(*command, "--regex", "(yes|no), [0-9]{3}").stdout)
    assert re.fullmatch("(yes|no), [0-9]{3}", report["text"])
    assert report["finish"] == "stop"
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [[1, "a"], [2]]}')
    assert json.loads(json.loads(cli(*command, "--json-schema", schema).stdout)["text"]) in ([1, "a"], [2])


def test_run_refuses_what_the_text_cannot_match(
    cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = ("run", engine, "--checkpoint", checkpoint, "--prompt", "And", "--max-new-tokens", 40)
    both = cli(*command, "--regex", "a", "--json-schema", tmp_path / "schema.json")
    assert both.stderr.endswith("--json-schema and --regex exclude each other; leave one out.\n")
    missing = cli(*command, "--json-schema", tmp_path / "schema.json")
    assert f"--json-schema: {tmp_path / 'schema.json'}: No such file or directory." in missing.stderr
    (tmp_path / "schema.json").write_text("# no schema")
    broken = cli(*command, "--json-schema", tmp_path / "schema.json")
    assert f"{tmp_path / 'schema.json'}: not JSON (Expecting value" in broken.stderr
    bad = cli(*command, "--regex", "a(")
    sentence = (
        "the regular expression 'a(' cannot constrain an output; correct or leave out what is said here:"
    )
    assert bad.stderr.startswith(f"Error: {sentence}\n")
    assert "unclosed group" in bad.stderr
    assert {result.exit_code for result in (both, missing, broken, bad)} == {2}


def test_eval_scores_a_file(cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("In the beginning was the Word, and the Word was with God.\n" * 2)
    command = ("eval", engine, "--checkpoint", checkpoint, "--text", file)
    whole = json.loads(cli(*command, "--json").stdout)
    part = json.loads(cli(*command, "--max-bytes", 58, "--json").stdout)
    assert (whole["bytes"], part["bytes"]) == (116, 58)
    assert whole["bits_per_byte"] == whole["bits"] / 116
    assert f"{whole['bits_per_byte']:.3f} bits per byte over 116 bytes" in cli(*command).stdout


def test_eval_scores_documents_each_from_an_empty_state(
    cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    documents = ["In the beginning\nwas the Word.\n", "And the Word was with God.\n"]
    reports = []
    for number, text in enumerate([*documents, "\n".join(documents)]):
        file = tmp_path / f"{number}.txt"
        file.write_text(text)
        command = ("eval", engine, "--checkpoint", checkpoint, "--text", file)
        reports.append(json.loads(cli(*command, "--documents", "--json").stdout))
    first, second, both = reports
    assert both["bits"] == pytest.approx(first["bits"] + second["bits"])
    assert both["bytes"] == first["bytes"] + second["bytes"]
    assert both["tokens"] == first["tokens"] + second["tokens"]


def test_inspect_of_an_engine_counts_its_ops_and_its_state(cli: Cli, engine: Path) -> None:
    report = json.loads(cli("inspect", engine, "--json").stdout)
    assert report["kind"] == "engine"
    assert sum(report["layers"].values()) == 3
    assert report["ops"]["V4MoE"] == 3
    assert report["ops"]["V4HyperPostPre"] == 6
    # Window [136, 512] of three layers; compressed, tails and index keys of one CSA and one HCA layer.
    window = 3 * 136 * 512 * 4
    hca = (1 * 512 + 2 * 136 * 512) * 4
    csa = (32 * 512 + 2 * 16 * 1024 + 32 * 128 + 2 * 16 * 256) * 4
    assert report["state_bytes"] == window + hca + csa
    text = cli("inspect", engine).stdout
    assert "backend ort, v4 numerics in float32, 128 tokens, all logits" in text


@pytest.mark.parametrize(
    ("preset", "tensors", "size"), [("flash", 69_187, 159_609_485_896), ("pro", 145_116, 864_704_792_696)]
)
def test_inspect_of_a_preset_is_the_official_inventory(
    cli: Cli, preset: str, tensors: int, size: int
) -> None:
    report = json.loads(cli("inspect", preset, "--json").stdout)
    assert (report["tensors"], report["bytes"]) == (tensors, size)
    assert f"{tensors:,} tensors, {size:,} bytes" in cli("inspect", preset).stdout


def test_inspect_of_a_checkpoint_counts_what_is_stored(cli: Cli, checkpoint: Path) -> None:
    report = json.loads(cli("inspect", checkpoint, "--json").stdout)
    [file] = checkpoint.glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert report["kind"] == "checkpoint"
    assert report["bytes"] == file.stat().st_size - header


def test_a_packed_checkpoint_gives_the_same_text(
    cli: Cli, engine: Path, checkpoint: Path, tmp_path: Path
) -> None:
    assert cli("pack", checkpoint, tmp_path / "packed").stdout.endswith("packed\n")
    texts = {
        cli("run", engine, "--checkpoint", folder, "--prompt", "And", "--max-new-tokens", 4).stdout
        for folder in (checkpoint, tmp_path / "packed")
    }
    assert len(texts) == 1


def test_an_unquantised_checkpoint_can_be_quantised(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("init", checkpoint, tmp_path / "bf16", "--layers", 1, "--experts", 2, "--unquantised")
    assert result.exit_code == 0, result.output
    assert json.loads(cli("inspect", tmp_path / "bf16", "--json").stdout)["by_type"].keys() == {
        "BF16",
        "F32",
        "I64",
    }
    assert cli("pack", tmp_path / "bf16", tmp_path / "fp8", "--quantize").exit_code == 0
    assert "F8_E4M3" in json.loads(cli("inspect", tmp_path / "fp8", "--json").stdout)["by_type"]


def test_a_dry_run_checks_and_writes_nothing(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("export", checkpoint, tmp_path / "graph", "--dry-run")
    assert result.exit_code == 0
    assert "weights checked; nothing written" in result.stdout
    assert "weights bound later" in cli("export", "flash", tmp_path / "graph", "--dry-run").stdout
    assert list(tmp_path.iterdir()) == []
