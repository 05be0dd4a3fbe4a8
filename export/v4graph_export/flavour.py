"""Which form of each op and weight a graph uses, from the options and the checkpoint's format."""

from __future__ import annotations

from dataclasses import dataclass

from v4graph.config import ModelConfig, WeightFormat
from v4graph.errors import ExportError
from v4graph.manifest import FloatType, Numerics


@dataclass(frozen=True)
class Flavour:
    """Numerics and dtype of a graph, and how the checkpoint stores its matrices."""

    numerics: Numerics
    dtype: FloatType
    weights: WeightFormat

    @property
    def quantised(self) -> bool:
        """Whether the graph quantises as the official model does."""
        return self.numerics == "v4"

    @property
    def scale_dtype(self) -> str:
        """Dtype of the FP8 block scales as graph inputs: e8m0 bytes or float32."""
        return "int8" if self.weights.scale == "e8m0" else "float32"


def check_flavour(config: ModelConfig, flavour: Flavour, name: str) -> None:
    """Refuse combinations that have no meaning, each with the way out.

    Raises:
        ExportError: exact numerics in bf16, v4 numerics on an unquantised checkpoint, or sizes that
            the quantisers' blocks do not divide.
    """
    if config.hc_mult != 4:
        raise ExportError(
            f"{name}: hc_mult is {config.hc_mult}, but the hyper-connection ops have 4 streams."
        )
    if not flavour.quantised:
        if flavour.dtype != "float32":
            raise ExportError(
                "exact numerics are float32 by definition; use --dtype fp32, "
                "or --numerics v4 with --dtype bf16."
            )
        return
    if not flavour.weights.quantised:
        raise ExportError(
            f"{name}: --numerics v4 needs FP8/FP4 weights, but this checkpoint is unquantised; quantise it "
            f"with `v4graph pack {name} OUT --quantize`, or export with --numerics exact."
        )
    for key, size, block in _blocks(config):
        if size % block:
            raise ExportError(
                f"{name}: {key} is {size}, but --numerics v4 quantises it in blocks of {block}; "
                "export with --numerics exact, or change the size to a multiple."
            )
    if config.index_head_dim != 128 or config.qk_rope_head_dim != 64:
        raise ExportError(
            f"{name}: --numerics v4 is defined for index_head_dim 128 and qk_rope_head_dim 64, got "
            f"{config.index_head_dim} and {config.qk_rope_head_dim}; export with --numerics exact."
        )


def _blocks(config: ModelConfig) -> tuple[tuple[str, int, int], ...]:
    return (
        ("hidden_size", config.hidden_size, 128),
        ("q_lora_rank", config.q_lora_rank, 128),
        ("o_groups * o_lora_rank", config.o_groups * config.o_lora_rank, 128),
        (
            "num_attention_heads * head_dim / o_groups",
            config.num_attention_heads * config.head_dim // config.o_groups,
            128,
        ),
        ("moe_intermediate_size", config.moe_intermediate_size, 128),
        ("head_dim - qk_rope_head_dim", config.head_dim - config.qk_rope_head_dim, 64),
    )
