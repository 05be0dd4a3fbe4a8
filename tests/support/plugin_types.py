"""The names of TensorRT's Python API that `plugin_classes` needs, for machines where none is installed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np


class DataType(enum.Enum):
    float32, bfloat16, int8, int32, int64 = "float32", "bfloat16", "int8", "int32", "int64"


class PluginFieldType(enum.Enum):
    INT32, FLOAT32, CHAR = range(3)


class TensorFormat(enum.Enum):
    LINEAR, CHW4 = range(2)


class PluginField:
    def __init__(self, name: str, data: Any, kind: PluginFieldType) -> None:
        self.name, self.data, self.type = name, data, kind


def plugin_fields(attributes: Mapping[str, Any]) -> list[Any]:
    """Return a node's attributes as a creator gets them; strings are CHARs with a NUL at the end."""
    return [
        SimpleNamespace(
            name=name,
            data=np.frombuffer(value.encode() + b"\0", np.int8)
            if isinstance(value, str)
            else np.array([value]),
        )
        for name, value in attributes.items()
    ]


class _Interface:
    pass


class PluginTypes:
    """Stands for the module; types are its attributes, as in `trt.float32`."""

    PluginFieldType, TensorFormat, PluginField = PluginFieldType, TensorFormat, PluginField
    PluginFieldCollection = DimsExprs = list
    float32, bfloat16, int8, int32, int64 = DataType

    IPluginV3 = type("IPluginV3", (_Interface,), {})
    IPluginV3OneCore = type("IPluginV3OneCore", (_Interface,), {})
    IPluginV3OneBuildV2 = type("IPluginV3OneBuildV2", (_Interface,), {})
    IPluginV3OneRuntime = type("IPluginV3OneRuntime", (_Interface,), {})
    IPluginCreatorV3One = type("IPluginCreatorV3One", (_Interface,), {})
