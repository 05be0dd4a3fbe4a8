"""The plugins of this installation, found through the entry point group `v4graph.plugins`.

The runtime knows no plugin by name: it runs where none is installed, until an engine needs one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from v4graph.errors import EngineError

GROUP, NAME = "v4graph.plugins", "tensorrt"


class Findings(Protocol):
    """What plugins found wrong, which TensorRT only reports as a failure."""

    def take(self) -> list[str]:
        """Return the sentences so far and forget them."""


class PluginHost(Protocol):
    """The plugins of one package."""

    @property
    def findings(self) -> Findings:
        """What the plugins of this process found wrong."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may be captured while the plugins run; known once a launcher is chosen."""

    def hashes(self) -> Mapping[str, str]:
        """Return op name -> sha256 of its contract and launch plan, for every op with a plugin."""

    def problem(self, dtype: str, gpu: str, folder: Path | None = None) -> str | None:
        """Return why plugins in a graph of `dtype` cannot run on a GPU, with the fix; None if they can.

        `folder` holds the kernels that the engine ships.
        """

    def register(self, trt: Any) -> None:
        """Register every creator with a TensorRT module; later calls do nothing."""

    def use_launcher(self, dtype: str, gpu: str, folder: Path | None = None) -> None:
        """Choose how the plugins run, as for `problem`."""


def find_host() -> PluginHost | None:
    """Return the installed plugin host, None if there is none.

    Raises:
        EngineError: it is installed but does not load.
    """
    for entry in entry_points(group=GROUP, name=NAME):
        try:
            host: PluginHost = entry.load()()
        except Exception as error:  # whatever a foreign package raises on import
            raise EngineError(
                f"the plugins of {entry.value} do not load ({type(error).__name__}: {error}); install "
                "v4graph again with `pip install --force-reinstall --no-deps v4graph`."
            ) from error
        return host
    return None
