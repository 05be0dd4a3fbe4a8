"""The Python packages that v4graph uses, as its own metadata lists them, and their installed versions."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import v4graph
from v4graph import ort
from v4graph.trt import version_tuple

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)\s*(?:\[[^\]]*\])?\s*(?:[>=]=\s*(?P<oldest>[\d.]+))?[^;]*"
    r"(?:;.*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)
# What developers need is in the dev extra, and no part of what a machine can do.
_NOT_FOR_USERS = "dev"


@dataclass(frozen=True)
class Package:
    """A distribution and the extras of v4graph that bring it; its installed version, or None.

    `fix` is the command that brings it, or a version that v4graph can use.
    """

    name: str
    version: str | None
    oldest: str
    extras: tuple[str, ...]
    fix: str


def find_packages() -> tuple[Package, ...]:
    """Return v4graph's requirements with what is installed of them, in the order of pyproject.toml."""
    rows: dict[str, tuple[str, list[str]]] = {}
    for line in _requirements():
        match = _REQUIREMENT.match(line)
        if match is None or match["extra"] == _NOT_FOR_USERS:
            continue
        _, extras = rows.setdefault(match["name"], (match["oldest"] or "", []))
        if match["extra"]:
            extras.append(match["extra"])
    return tuple(_package(name, oldest, tuple(extras)) for name, (oldest, extras) in rows.items())


def _package(name: str, oldest: str, extras: tuple[str, ...]) -> Package:
    version = _version(name)
    target = f"'v4graph[{extras[0]}]'" if extras else "v4graph"
    install = f"pip install {'--upgrade ' if version else ''}{target}"
    # Both write into the folder onnxruntime, so the second is no addition.
    others = [other for other in ort.installed() if other != name and name in ort.DISTRIBUTIONS.values()]
    if others and not version:
        install = f"pip uninstall {others[0]}; {install}"
    return Package(name, version, oldest, extras, install)


def package_problems(found: Iterable[Package]) -> Iterator[str]:
    """Yield a sentence per package that is older than v4graph needs."""
    for package in found:
        if package.version is None:
            # An extra may be left out; v4graph's own requirements may not.
            if not package.extras:
                yield f"{package.name} is not installed, v4graph needs it; install it with `{package.fix}`."
        elif version_tuple(package.version) < version_tuple(package.oldest):
            yield (
                f"{package.name} {package.version} is installed, v4graph needs {package.oldest} or later; "
                f"upgrade it with `{package.fix}`."
            )


def _requirements() -> list[str]:
    # A checkout's own file first: the metadata of an editable installation may be older.
    file = Path(v4graph.__file__).parents[1] / "pyproject.toml"
    if file.is_file():
        project = tomllib.loads(file.read_text("utf-8")).get("project", {})
        if project.get("name") == "v4graph":
            extras = project["optional-dependencies"].items()
            marked = [f'{line}; extra == "{extra}"' for extra, lines in extras for line in lines]
            return [*project["dependencies"], *marked]
    try:
        return importlib.metadata.requires("v4graph") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
