"""The models that peers.py compares engines on: their files, made once, their sides and what is claimed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peers_side import SideSpec

from v4graph.checkpoint import Checkpoint
from v4graph.checkpoint.init import init
from v4graph.checkpoint.pack import pack
from v4graph.config import OFFICIAL, UNQUANTISED, ModelConfig, WeightFormat
from v4graph.inventory import Role, weight_specs
from v4graph.manifest import Numerics

Report = Callable[[str, int, int], None]

SEED = 0
STRETCH = 1.5
EXACT, V4, EAGER = "v4graph exact float32", "v4graph v4 (FP8, FP4)", "transformers eager float32"
LLAMA_F32, LLAMA_BF16, LLAMA_Q8 = "llama.cpp float32", "llama.cpp bf16", "llama.cpp Q8_0 + MXFP4"


@dataclass(frozen=True)
class Claim:
    """`ours` is at least `required` times as fast as the fastest of `peers`; `stretch` is hoped for."""

    figure: Literal["prefill", "decode"]
    ours: str
    peers: tuple[str, ...]
    required: float
    stretch: float = STRETCH


@dataclass(frozen=True)
class Contest:
    """One model: sides to time in turn, sides whose logits must be those of the first, and claims."""

    name: str
    config: ModelConfig
    sides: tuple[SideSpec, ...]
    same_logits: tuple[SideSpec, ...]
    claims: tuple[Claim, ...]

    @property
    def parameters(self) -> int:
        """Weights of the main model."""
        specs = weight_specs(self.config)
        return sum(
            math.prod(one.shape)
            for one in specs
            if one.role is not Role.INT64 and not one.name.startswith("mtp.")
        )


class Files:
    """The files of one model in a folder; what is there already is not made again."""

    def __init__(self, folder: Path, report: Report) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._report = report

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self._folder / name
        if not path.exists():
            self._report(f"write {path}", 0, 1)
            make(path)
        return path

    def checkpoint(self, config: ModelConfig, weights: WeightFormat) -> Path:
        """Random weights, experts stacked as engines read them."""
        random = self._once("weights", lambda path: init(config, path, SEED, weights=weights))
        return self._once("packed", lambda path: pack(random, path))

    def quantised(self, checkpoint: Path) -> Path:
        """The same weights in FP8 and FP4."""
        small = self._once("quantised", lambda path: pack(checkpoint, path, quantise=True))
        return self._once("quantised-packed", lambda path: pack(small, path))

    def engine(self, checkpoint: Path, numerics: Numerics, capacity: int) -> Path:
        """An engine for onnxruntime on the CPU."""
        from v4graph.source import resolve
        from v4graph_export import ExportOptions, export_graph
        from v4graph_runtime.build import build_engine

        def make(path: Path) -> None:
            options = ExportOptions(numerics=numerics, max_seq_len=capacity)
            with tempfile.TemporaryDirectory() as folder:
                export_graph(resolve(str(checkpoint)), Path(folder, "graph"), options)
                build_engine(Path(folder, "graph"), path)

        return self._once(f"{numerics}-{capacity}.engine", make)

    def gguf(self, checkpoint: Path, matrices: Literal["f32", "bf16"]) -> Path:
        """The same weights for llama.cpp."""
        from gguf_checkpoint import write_gguf

        opened = Checkpoint.open(checkpoint)
        return self._once(f"{matrices}.gguf", lambda path: write_gguf(opened, path, matrices))

    def gguf_quantised(self, source: Path) -> Path:
        """A GGUF file by llama.cpp's own quantiser: Q8_0, experts MXFP4."""
        from llama_side import quantise

        return self._once("q8_0-mxfp4.gguf", lambda path: quantise(source, path))


def small(folder: Path, capacity: int, llama: bool, report: Report) -> Contest:
    """A V4 of 66.6M parameters, its weights bf16 values that every side holds in its own format."""
    files = Files(folder / "v4-65m", report)
    config = ModelConfig.load(Path(__file__).with_name("v4-65m.config.json"))
    weights = files.checkpoint(config, UNQUANTISED)
    quantised = files.quantised(weights)
    exact = SideSpec(EXACT, "v4graph", files.engine(weights, "exact", capacity), weights)
    v4 = SideSpec(V4, "v4graph", files.engine(quantised, "v4", capacity), quantised)
    eager = SideSpec(EAGER, "transformers", folder / "v4-65m" / "weights")
    theirs: tuple[SideSpec, ...] = ()
    same: tuple[SideSpec, ...] = (eager,)
    if llama:
        f32 = files.gguf(weights, "f32")
        theirs = (
            SideSpec(LLAMA_F32, "llama.cpp", f32),
            SideSpec(LLAMA_BF16, "llama.cpp", files.gguf(weights, "bf16")),
            SideSpec(LLAMA_Q8, "llama.cpp", files.gguf_quantised(f32)),
        )
        same += (SideSpec(f"{LLAMA_F32} without flash attention", "llama.cpp", f32, exact=True),)
    peers = (EAGER, LLAMA_F32, LLAMA_BF16, LLAMA_Q8)
    claims = (
        Claim("decode", EXACT, (LLAMA_F32,), 1.0),
        Claim("decode", EXACT, (EAGER,), 5.0, stretch=5.0),
        Claim("decode", V4, (LLAMA_Q8,), 1.0),
        Claim("prefill", EXACT, peers, 1.3),
        Claim("prefill", V4, peers, 1.3),
    )
    return Contest("v4-65m", config, (exact, v4, eager, *theirs), same, claims)


def flash(folder: Path, capacity: int, llama: bool, report: Report) -> Contest:
    """The first 4 layers of V4-Flash, 8 experts top-2, a vocabulary of 8192, FP8 and FP4 as published."""
    files = Files(folder / "flash-4-layers", report)
    shrunk = ModelConfig.load("flash").shrink(layers=4, experts=8).raw
    shrunk |= {"num_experts_per_tok": 2, "vocab_size": 8192, "num_nextn_predict_layers": 0}
    shrunk["compress_ratios"] = shrunk["compress_ratios"][:4]
    config = ModelConfig.from_dict(shrunk, source="flash, shrunk")
    weights = files.checkpoint(config, OFFICIAL)
    v4 = SideSpec(V4, "v4graph", files.engine(weights, "v4", capacity), weights)
    theirs: tuple[SideSpec, ...] = ()
    if llama:
        bf16 = files.gguf(weights, "bf16")
        theirs = (
            SideSpec(LLAMA_BF16, "llama.cpp", bf16),
            SideSpec(LLAMA_Q8, "llama.cpp", files.gguf_quantised(bf16)),
        )
    claims = tuple(
        Claim(figure, V4, (peer,), 1.0) for figure in ("decode", "prefill") for peer in (LLAMA_BF16, LLAMA_Q8)
    )
    return Contest("flash-4-layers", config, (v4, *theirs), (), claims)


MODELS = {"v4-65m": small, "flash-4-layers": flash}
