"""GPUs to plan for: the published figures of gpus.toml, or a file of the same form."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from v4graph.errors import ConfigError, near_match
from v4graph.targets import ARCHITECTURES

TABLE = Path(__file__).with_name("gpus.toml")
DEFAULT = "h200"


@dataclass(frozen=True)
class GpuSpec:
    """A GPU's published figures; units are in the names, decimal; `name` is what the user calls it.

    Rates are dense, of matrix products accumulated in float32; 0 where the tensor cores lack the type.
    """

    name: str
    title: str
    target: str
    memory_gb: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp8_tflops: float
    fp4_tflops: float
    link_gb_s: float
    host_gb_s: float

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return int(self.memory_gb * 1e9)

    @property
    def shares_memory(self) -> bool:
        """Whether its memory is the host's, so that nothing is gained by leaving weights there."""
        return self.host_gb_s >= self.bandwidth_gb_s


@functools.cache
def known() -> Mapping[str, GpuSpec]:
    """Return the GPUs of gpus.toml by name."""
    return {name: _spec(name, raw, str(TABLE)) for name, raw in tomllib.loads(TABLE.read_text()).items()}


def find(name: str) -> GpuSpec:
    """Return the GPU of this name, or the one that a .toml file describes.

    Raises:
        ConfigError: no such GPU (near matches are named), or the file lacks a figure or has a bad one.
    """
    if not name.endswith(".toml"):
        found = known().get(name.lower().replace(" ", "").replace("_", "-"))
        if found is None:
            raise ConfigError(
                f"--gpu {name}: no such GPU{near_match(name.lower(), known(), most=3)}; known are "
                f"{', '.join(known())}, or give a .toml file with the figures of one."
            )
        return found
    path = Path(name)
    try:
        raw = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--gpu {name}: cannot be read ({error.strerror}).") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gpu {name}: not valid TOML ({error}).") from error
    if len(raw) == 1 and isinstance(only := next(iter(raw.values())), dict):
        # One [name] table, as gpus.toml has them.
        return _spec(next(iter(raw)), only, name)
    return _spec(path.stem, raw, name)


def _spec(name: str, raw: Mapping[str, Any], source: str) -> GpuSpec:
    wanted = {field.name: str(field.type) for field in fields(GpuSpec) if field.name != "name"}
    for key in sorted(raw.keys() - wanted.keys()):
        raise ConfigError(
            f"{source}: unknown key '{key}'{near_match(key, wanted)}; expected {', '.join(wanted)}."
        )
    for key, kind in wanted.items():
        if key not in raw:
            raise ConfigError(f"{source}: no {key}; a GPU needs {', '.join(wanted)}.")
        value = raw[key]
        optional = key in ("fp8_tflops", "fp4_tflops")
        if kind == "str" and not isinstance(value, str):
            raise ConfigError(f"{source}: {key} is {value!r}, expected text.")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "float" and not (number and (value > 0 or (optional and value == 0))):
            raise ConfigError(f"{source}: {key} is {value!r}, expected a number above 0.")
    if raw["target"] not in ARCHITECTURES:
        raise ConfigError(
            f"{source}: target is {raw['target']!r}{near_match(raw['target'], ARCHITECTURES)}; "
            f"expected one of {', '.join(ARCHITECTURES)}."
        )
    return GpuSpec(name=name, **raw)
