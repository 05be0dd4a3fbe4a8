"""`v4graph view`: one file without network, which a browser opens, draws and lets people open further."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from graphs import export_nano

from v4graph.cli import main
from v4graph.source import resolve
from v4graph_export import ExportOptions, export_graph

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
needs_browser = pytest.mark.skipif(
    not BROWSER, reason="no Chromium here; install it with `apt install chromium`"
)
View = Callable[..., Result]

# Runs in the page before its own scripts, and at the end: errors, milliseconds, and what a test asks for.
WATCH = "<script>const errors = []; addEventListener('error', (e) => errors.push(e.message));</script>"
REPORT = """<script>addEventListener('load', async () => {
  const asked = await (async () => { %s })();
  const out = document.createElement('pre');
  out.id = 'probe';
  out.textContent = JSON.stringify({ errors, ms: performance.now(), asked });
  document.body.append(out);
});</script>"""
PAUSE = "const pause = () => new Promise((done) => setTimeout(done, 30));"


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Flash as traced and optimised."""
    folder = tmp_path_factory.mktemp("flash")
    for name, optimize in (("traced", False), ("graph", True)):
        export_graph(resolve("flash"), folder / name, ExportOptions(dtype="bfloat16", optimize=optimize))
    return folder / "traced", folder / "graph"


@pytest.fixture
def view() -> View:
    return lambda *arguments: CliRunner().invoke(main, ["view", *map(str, arguments)])


def probe(page: Path, script: str = "") -> dict[str, Any]:
    """Open a page in a headless browser, run a script in it, and return what it found."""
    text = page.read_text()
    watched = page.with_suffix(".probe.html")
    text = text.replace("<head>", f"<head>{WATCH}", 1).replace(
        "</body>", REPORT % (PAUSE + script) + "</body>", 1
    )
    watched.write_text(text)
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=8000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, watched.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


def test_a_page_is_one_file_below_three_megabytes(
    flash: tuple[Path, Path], tmp_path: Path, view: View
) -> None:
    result = view(flash[1], "-o", tmp_path / "flash.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "flash.html").read_text()
    assert len(text.encode()) < 3_000_000
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", text)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|@import|url\(", text)


@needs_browser
def test_flash_opens_in_two_seconds_and_its_layers_open(
    flash: tuple[Path, Path], tmp_path: Path, view: View
) -> None:
    view(flash[1], "-o", tmp_path / "flash.html", "--context", "128K")
    found = probe(
        tmp_path / "flash.html",
        """const groups = [...document.querySelectorAll('details.group')];
        const csa = groups.find((g) => g.textContent.includes('csa_topk'));
        csa.open = true; await pause();
        const ops = [...csa.querySelectorAll('.op')].map((op) => op.dataset.op);
        const prep = [...csa.querySelectorAll('.op')].find((op) => op.dataset.op === 'V4CsaPrep');
        prep.open = true; await pause();
        return { groups: groups.length, ops, prep: prep.textContent,
                 head: csa.querySelector('summary').textContent,
                 bars: document.querySelectorAll('#charts rect').length,
                 cards: document.getElementById('cards').textContent };""",
    )
    asked = found["asked"]
    assert found["errors"] == []
    assert found["ms"] < 2000
    assert asked["groups"] == 6  # embedding, four kinds, head
    assert asked["ops"][:4] == ["V4HyperPostPre", "V4CsaProjections", "V4CsaQueryProjections", "V4CsaPrep"]
    assert len(asked["ops"]) == 11
    assert "index" in asked["prep"]
    assert "20 launches" in asked["head"]
    assert "773" in asked["cards"]
    assert asked["bars"] > 2 * 43


@needs_browser
def test_another_context_changes_the_figures(flash: tuple[Path, Path], tmp_path: Path, view: View) -> None:
    view(flash[1], "-o", tmp_path / "flash.html", "--context", "0")
    found = probe(
        tmp_path / "flash.html",
        """const before = document.getElementById('cards').textContent;
        const slider = document.getElementById('context');
        slider.value = slider.max;
        slider.dispatchEvent(new Event('input', { bubbles: true }));
        slider.dispatchEvent(new Event('change', { bubbles: true })); await pause();
        return { before, after: document.getElementById('cards').textContent,
                 context: document.getElementById('context-text').textContent };""",
    )
    assert found["errors"] == []
    assert found["asked"]["context"] == "1M tokens"
    assert found["asked"]["before"] != found["asked"]["after"]


@needs_browser
def test_a_difference_shows_what_was_added(flash: tuple[Path, Path], tmp_path: Path, view: View) -> None:
    result = view(flash[0], "--against", flash[1], "-o", tmp_path / "diff.html")
    assert result.exit_code == 0, result.output
    found = probe(
        tmp_path / "diff.html",
        """const groups = [...document.querySelectorAll('#diff details')];
        const hca = groups.find((g) => g.textContent.includes('hca_topk'));
        hca.open = true; await pause();
        const ops = (tag) => [...hca.querySelectorAll(`tr.${tag}`)].map((row) => row.dataset.op);
        return { added: ops('added'), removed: ops('removed'),
                 totals: document.getElementById('diff').textContent };""",
    )
    assert found["errors"] == []
    assert "V4HcaPrep" in found["asked"]["added"]
    assert {"V4Compress", "V4AttentionPrep"} <= set(found["asked"]["removed"])
    assert "1,166" in found["asked"]["totals"]
    assert "773" in found["asked"]["totals"]


def test_the_report_has_what_measure_says(flash: tuple[Path, Path], view: View) -> None:
    report = json.loads(view(flash[1], "--json", "--context", "4K").stdout)
    (graph,) = report["graphs"]
    assert report["contexts"][report["chosen"]] == 4096
    assert len(graph["layers"]) == 45
    assert len(graph["blocks"]) == 6
    assert graph["totals"][report["chosen"]]["launches"] == 731
    assert {state["name"] for state in graph["states"]} >= {"window", "compressed", "index_keys"}


@needs_browser
def test_a_tensorrt_engine_says_that_it_has_no_graph(tmp_path: Path, view: View) -> None:
    graph = export_nano(tmp_path / "graph", max_seq_len=512)
    built = CliRunner().invoke(
        main, ["build", str(graph), str(tmp_path / "engine"), "--backend", "trt", "--target", "sm120"]
    )
    assert built.exit_code == 0, built.output
    assert view(tmp_path / "engine", "-o", tmp_path / "engine.html").exit_code == 0
    found = probe(tmp_path / "engine.html", "return document.body.innerText;")
    assert found["errors"] == []
    assert "has no graph to open" in found["asked"]
    assert "V4CsaPrep" in found["asked"]
    refused = view(tmp_path / "engine", "--against", graph, "-o", tmp_path / "no.html")
    assert refused.exit_code == 2
    assert "a TensorRT plan has no graph to compare" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{folder}",), "say where the page goes with -o FILE"),
        (
            ("/nowhere", "-o", "{folder}/x.html"),
            "/nowhere: does not exist, expected a graph or engine directory",
        ),
        (("{folder}", "-o", "{folder}/x.html"), "no manifest.json here"),
        (("{folder}", "-o", "{folder}/x.html", "--context", "lots"), "'lots' is not a number of tokens"),
    ],
)
def test_bad_paths_are_said(tmp_path: Path, view: View, arguments: tuple[str, ...], said: str) -> None:
    result = view(*(text.format(folder=tmp_path) for text in arguments))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_leaves_nothing(
    flash: tuple[Path, Path], tmp_path: Path, view: View
) -> None:
    result = view(flash[1], "-o", tmp_path / "missing" / "page.html")
    assert result.exit_code == 2
    assert "the page cannot be written" in " ".join(result.output.split())
