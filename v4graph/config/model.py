"""`ModelConfig`, read from a config.json, from a directory that holds one, or from a preset.

Two spellings are read: the official hub form (compress_ratios, num_hash_layers, rope_scaling) and
the form that transformers writes (layer_types, mlp_layer_types, compress_rates, rope_parameters).
Source: the published config.json files of DeepSeek-V4 and transformers' DeepseekV4Config.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from v4graph.config.keys import read_fields
from v4graph.config.rewrite import shrink_raw
from v4graph.config.types import Layer, Rope, WeightFormat
from v4graph.errors import ConfigError, near_match

PRESETS = ("flash", "pro", "nano")
FILE_NAME = "config.json"


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the graph, under the names of config.json where it has one.

    Attributes:
        layers: The decoder layers in order.
        mtp_layers: The multi-token-prediction layers, empty when there are none.
        rope: Positions of layers without compression, and of the MTP layers.
        compress_rope: Positions of CSA and HCA layers (queries, keys, entries and the indexer).
        weight_format: What config.json announces; a checkpoint may refine it from its tensors.
        bos_token_id: -1 when config.json has none.
        eos_token_id: The first one when config.json lists several, -1 when it has none.
        raw: config.json as read.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    layers: tuple[Layer, ...]
    mtp_layers: tuple[Layer, ...]
    rope: Rope
    compress_rope: Rope
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    bos_token_id: int
    eos_token_id: int
    max_position_embeddings: int
    weight_format: WeightFormat
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def load(cls, source: str | Path, *, allow_unknown: bool = False) -> ModelConfig:
        """Read a config.json, a directory that holds one, or a preset ("flash", "pro", "nano").

        A preset name is taken as a path where such a path exists.

        Raises:
            ConfigError: nothing there, not JSON, or not a DeepSeek-V4 that v4graph knows.
        """
        path = _locate(source)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise ConfigError(
                f"{path}: not valid JSON ({error}); copy the checkpoint's {FILE_NAME} again."
            ) from error
        return cls.from_dict(raw, source=str(path), allow_unknown=allow_unknown)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], *, source: str, allow_unknown: bool = False) -> ModelConfig:
        """Check a parsed config.json and build the configuration; `source` is named in errors.

        Raises:
            ConfigError: a key is unknown or missing, or a value is one that v4graph does not support.
        """
        return cls(**read_fields(raw, source, allow_unknown), raw=raw)

    @property
    def sha256(self) -> str:
        """Hash of `raw` in canonical JSON, so that formatting and key order do not matter."""
        text = json.dumps(self.raw, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def shrink(self, layers: int | None = None, experts: int | None = None) -> ModelConfig:
        """Return the same model with only its first `layers` layers or `experts` experts.

        Raises:
            ConfigError: more than the model has, or fewer experts than a token selects.
        """
        _check_at_most("layers", layers, len(self.layers), 1)
        _check_at_most("experts", experts, self.n_routed_experts, self.num_experts_per_tok)
        raw = shrink_raw(self.raw, layers, experts)
        # Unknown keys, if any, were accepted when this configuration was read.
        return type(self).from_dict(raw, source="shrunk config", allow_unknown=True)


def _check_at_most(what: str, value: int | None, most: int, least: int) -> None:
    if value is not None and not least <= value <= most:
        raise ConfigError(f"cannot shrink to {value} {what}; this model allows {least} to {most}.")


def _locate(source: str | Path) -> Path:
    """Return the config.json that `source` means; a preset gives way to a path that holds one."""
    path = Path(source)
    if path.is_file():
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    if str(source) in PRESETS:
        preset = Path(__file__).parents[1] / "presets" / f"{source}.config.json"
        if not preset.is_file():
            raise ConfigError(
                f"preset '{source}' has no file {preset.name} in this installation; reinstall v4graph."
            )
        return preset
    if path.is_dir():
        raise ConfigError(f"{path}: no {FILE_NAME} in this directory; copy the model's {FILE_NAME} there.")
    raise ConfigError(
        f"{source}: no such file, directory or preset{near_match(str(source), PRESETS) or '.'} "
        f"Give a {FILE_NAME}, a directory that holds one, or one of {', '.join(PRESETS)}."
    )
