"""The one lazy import of torch in `v4graph.ops`: specs stay usable on machines without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
else:

    class _LazyTorch:
        """Stands for the torch module and imports it at the first attribute access."""

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _LazyTorch()

__all__ = ["torch"]
