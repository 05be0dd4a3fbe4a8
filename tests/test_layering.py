"""Who may import whom: the towers meet only in the core, and heavy packages have owners."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "v4graph": ROOT / "v4graph",
    "v4graph_export": ROOT / "export" / "v4graph_export",
    "v4graph_plugins": ROOT / "plugins" / "v4graph_plugins",
    "v4graph_runtime": ROOT / "runtime" / "v4graph_runtime",
}
DRIVERS = ("v4graph.cli", "v4graph.verify")

Kind = Literal["module", "lazy", "typing"]
ANYHOW: frozenset[Kind] = frozenset({"module", "lazy", "typing"})
LAZILY: frozenset[Kind] = frozenset({"lazy", "typing"})
TYPING: frozenset[Kind] = frozenset({"typing"})
ONNX: dict[str, frozenset[Kind]] = {
    "v4graph_export": ANYHOW,
    "v4graph.ops": LAZILY,
    "v4graph.passes": ANYHOW,
    "v4graph_plugins": ANYHOW,
    "v4graph.cli": LAZILY,
    "v4graph.verify": ANYHOW,
    "v4graph.viewer": TYPING,
}
# Package -> modules that may import it, and how; the longest matching module name decides.
OWNERS: dict[str, dict[str, frozenset[Kind]]] = {
    "torch": {
        "v4graph_export": ANYHOW,
        "v4graph.ops": TYPING,
        "v4graph.ops.lazy": LAZILY,
        "v4graph_plugins.reference_launcher": LAZILY,
        "v4graph.verify": LAZILY,
    },
    "transformers": {"v4graph.verify": LAZILY},
    "onnx": ONNX,
    "onnx_ir": ONNX,
    "onnxscript": ONNX,
    "onnxruntime": {"v4graph_runtime": LAZILY},
    "tokenizers": {"v4graph_runtime": LAZILY},
    "llguidance": {"v4graph_runtime": LAZILY},
    "tensorrt": {"v4graph_plugins": ANYHOW, "v4graph_runtime": LAZILY},
    "tensorrt_rtx": {"v4graph_plugins": ANYHOW, "v4graph_runtime": LAZILY},
    "cuda": {"v4graph_plugins": LAZILY, "v4graph_runtime": LAZILY},
    "huggingface_hub": {"v4graph.source": LAZILY},
    "starlette": {"v4graph_runtime.serving": ANYHOW},
    "uvicorn": {"v4graph_runtime.serving.server": ANYHOW},
    "pydantic": {"v4graph_runtime.serving": ANYHOW},
    "prometheus_client": {"v4graph_runtime.serving.metrics": ANYHOW},
    "click": {"v4graph.cli": ANYHOW},
    "rich": {"v4graph.cli": LAZILY},
    "matplotlib": {"v4graph.planning.page": ANYHOW},
    "jinja2": {"v4graph.planning.page": ANYHOW},
}


@dataclass(frozen=True)
class Import:
    module: str
    name: str
    kind: Kind
    line: int


def imports(module: str, tree: ast.Module) -> list[Import]:
    """Return every import of a module, with how it happens: on import, in a function, for types only."""
    found: list[Import] = []

    def visit(node: ast.AST, kind: Kind) -> None:
        found.extend(Import(module, name, kind, getattr(node, "lineno", 0)) for name in _names(node))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                visit(child, "typing")
            for child in node.orelse:
                visit(child, kind)
            return
        inner: Kind = (
            "lazy" if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else kind
        )
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, "module")
    return found


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
        # `from v4graph import cli` imports the submodule v4graph.cli.
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
        yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def violation(found: Import) -> str | None:
    """Return why an import breaks the layers, or None."""
    top = found.name.partition(".")[0]
    tower = found.module.partition(".")[0]
    driver = any(within(found.module, name) for name in DRIVERS)
    if top in PACKAGES:
        if any(within(found.name, name) for name in DRIVERS) and not driver:
            return "nothing imports the drivers"
        if top in (tower, "v4graph") or (driver and found.kind != "module"):
            return None
        return "towers meet only in v4graph; its drivers import them inside functions"
    if top in OWNERS:
        owners = [name for name in OWNERS[top] if within(found.module, name)]
        allowed = OWNERS[top][max(owners, key=len)] if owners else frozenset()
        if found.kind not in allowed:
            return f"{top} is for {', '.join(OWNERS[top]) or 'none of the packages'}"
    return None


def modules() -> Iterator[tuple[str, Path]]:
    for name, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((name, *(part for part in parts if part != "__init__"))), path


def test_every_package_is_found() -> None:
    assert {module.partition(".")[0] for module, _ in modules()} == set(PACKAGES)


def test_imports_follow_the_layers() -> None:
    bad = [
        f"{path.relative_to(ROOT)}:{found.line}: imports {found.name} ({found.kind}): {why}"
        for module, path in modules()
        for found in imports(module, ast.parse(path.read_text()))
        if (why := violation(found))
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("v4graph.config", "import torch"),
        ("v4graph.ops.moe", "def f():\n    import torch"),
        ("v4graph.config", "from v4graph_export import export_graph"),
        ("v4graph.cli.export", "import v4graph_export"),
        ("v4graph_runtime.session", "from v4graph_export.layers import Layer"),
        ("v4graph_runtime.session", "def f():\n    import torch"),
        ("v4graph_runtime.session", "import onnxruntime"),
        ("v4graph_runtime.device", "from cuda.bindings import driver"),
        ("v4graph.gpu", "def f():\n    from cuda.bindings import driver"),
        ("v4graph_export.export", "import onnxruntime"),
        ("v4graph_export.export", "from v4graph import cli"),
        ("v4graph.checkpoint", "import importlib\nimportlib.import_module('torch')"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, text: str) -> None:
    assert [found for found in imports(module, ast.parse(text)) if violation(found)]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("v4graph_export.model", "import torch"),
        ("v4graph.ops.lazy", "def f():\n    import torch"),
        ("v4graph.ops.moe", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("v4graph.cli.export", "def f():\n    from v4graph_export import export_graph"),
        ("v4graph_runtime.ort", "def f():\n    import onnxruntime"),
        ("v4graph_runtime.device", "def f():\n    from cuda.bindings import driver"),
    ],
)
def test_an_allowed_import_is_let_through(module: str, text: str) -> None:
    assert not [found for found in imports(module, ast.parse(text)) if violation(found)]


def test_no_file_names_a_path_of_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|opt|tmp)/\w")
    roots = [*PACKAGES.values(), *(ROOT / name for name in ("docs", "nano", "tests", ".ci"))]
    files = [path for root in roots for path in root.rglob("*") if path.suffix in (".py", ".md", ".sh", "")]
    files += [ROOT / name for name in ("Makefile", "README.md", "CHANGELOG.md", "pyproject.toml")]
    bad = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.is_file()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not bad, "\n".join(bad)
