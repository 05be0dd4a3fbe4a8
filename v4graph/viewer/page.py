"""A report as one HTML file that needs nothing else: styles, scripts and data are inside."""

from __future__ import annotations

import html
import json
import os
from importlib import resources
from pathlib import Path

from v4graph.errors import EngineError
from v4graph.viewer.blocks import Json

# page.html names each file once, as {{page.css}}.
_FILES = ("page.css", "format.js", "chart.js", "layers.js", "diff.js", "page.js")


def render(report: Json) -> str:
    """Return the page of a report."""
    folder = resources.files("v4graph.viewer")
    text = folder.joinpath("page.html").read_text(encoding="utf-8")
    for name in _FILES:
        text = text.replace(f"{{{{{name}}}}}", folder.joinpath(name).read_text(encoding="utf-8"))
    data = json.dumps(report, ensure_ascii=False, separators=(",", ":"))
    title = " against ".join(Path(graph["path"]).name or graph["path"] for graph in report["graphs"])
    text = text.replace("{{title}}", html.escape(title))
    # "<" in a string of the data could end the script element.
    return text.replace("{{data}}", data.replace("<", "\\u003c"))


def write(text: str, path: Path) -> None:
    """Write a page under a temporary name, then rename it.

    Raises:
        EngineError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise EngineError(
            f"{path}: the page cannot be written ({error.strerror}); choose another file with -o."
        ) from error
