"""The plan as one HTML file: its figures, and caches and FLOPs against context for V4 and V3.2.

The charts are drawn by matplotlib into SVG inside the page, which loads nothing from elsewhere.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure

from v4graph.config import ModelConfig
from v4graph.planning import reference
from v4graph.planning.cache import PACKED, CacheFormat, bytes_per_token
from v4graph.planning.comparison import fp8_equivalents, published_flops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTEXTS = tuple(1 << k for k in range(10, 21))
_COLOURS = {"V3.2": "#8a8f98", "V4-Flash": "#0b7a75", "V4-Pro": "#b3541e", "this model": "#4a3f8f"}
Curve = Callable[[int], float]


def write_page(report: dict[str, Any], config: ModelConfig, path: Path) -> None:
    """Write the page under a temporary name, then rename it."""
    shown = Environment(
        loader=PackageLoader("v4graph.planning", "templates"), autoescape=True, undefined=StrictUndefined
    )
    shown.filters |= {"gb": lambda n: f"{n / 1e9:,.2f}", "count": lambda n: f"{n:,}"}
    text = shown.get_template("plan.html").render(plan=report, charts=charts(report["model"]["name"], config))
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def charts(name: str, config: ModelConfig) -> str:
    """Return the SVG text of the two charts: Flash, Pro, V3.2, and `config` if it is neither of the two."""
    with rc_context({"svg.hashsalt": "v4graph", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure((10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        models = {f"V4-{one.capitalize()}": ModelConfig.load(one) for one in ("flash", "pro")}
        if config not in models.values():
            models["this model"] = config
        _draw(left, {f"{k}, packed rows": _cache(c, PACKED) for k, c in models.items()}, "-")
        _draw(left, {f"{k}, bf16 rows": _cache(c, CacheFormat()) for k, c in models.items()}, ":")
        _draw(left, {"V3.2": lambda n: n * reference.BYTES_PER_TOKEN / 1e9}, "-")
        _draw(right, {k: _flops(c) for k, c in models.items()}, "-")
        _draw(right, {"V3.2": lambda n: reference.fp8_flops(n) / 1e9}, "-")
        _label(left, "KV cache of one slot, GB")
        _label(right, "GFLOP per decoded token, FP8 equivalents")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Title": f"plan of {name}"})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _cache(config: ModelConfig, cache: CacheFormat) -> Curve:
    per_token = bytes_per_token(config, cache)
    return lambda context: context * per_token / 1e9


def _flops(config: ModelConfig) -> Curve:
    return lambda context: fp8_equivalents(published_flops(config, context), PACKED) / 1e9


def _draw(axes: Axes, curves: dict[str, Curve], style: str) -> None:
    for name, curve in curves.items():
        colour = _COLOURS[name.split(",")[0]]
        axes.plot(CONTEXTS, [curve(n) for n in CONTEXTS], style, color=colour, label=name)


def _label(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(CONTEXTS[::2], [f"{n >> 10}K" if n < 1 << 20 else "1M" for n in CONTEXTS[::2]])
    axes.set_xlabel("tokens of context")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
