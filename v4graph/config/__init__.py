"""config.json -> `ModelConfig`: the one description of a model that every stage reads."""

from v4graph.config.model import FILE_NAME, PRESETS, ModelConfig
from v4graph.config.types import (
    OFFICIAL,
    UNQUANTISED,
    Attention,
    Layer,
    Rope,
    Routing,
    WeightFormat,
)

__all__ = [
    "FILE_NAME",
    "OFFICIAL",
    "PRESETS",
    "UNQUANTISED",
    "Attention",
    "Layer",
    "ModelConfig",
    "Rope",
    "Routing",
    "WeightFormat",
]
