"""Graph and engine directories to one page of HTML: what is in them, and what a step of theirs moves."""

from __future__ import annotations

from v4graph.viewer.diff import compare
from v4graph.viewer.page import render, write
from v4graph.viewer.report import Subject, describe

__all__ = ["Subject", "compare", "describe", "render", "write"]
