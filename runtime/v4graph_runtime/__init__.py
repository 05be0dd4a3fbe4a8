"""Run engines: state, sessions, sampling and text, with no torch and no exporter code.

onnxruntime, TensorRT, CUDA and tokenizers are imported when a session or a tokenizer is opened, not here.
"""

from v4graph_runtime.build import build_engine
from v4graph_runtime.evaluate import Score, bits_per_byte, score
from v4graph_runtime.generate import GenerateOptions, Stats, TextStream, stream
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.prefix_cache import CacheStats, PrefixCache
from v4graph_runtime.session import Session
from v4graph_runtime.snapshot import Snapshot
from v4graph_runtime.tokenizer import Tokenizer
from v4graph_runtime.trt_backend import TrtOptions

__all__ = [
    "CacheStats",
    "GenerateOptions",
    "OrtOptions",
    "PrefixCache",
    "Score",
    "Session",
    "Snapshot",
    "Stats",
    "TextStream",
    "Tokenizer",
    "TrtOptions",
    "bits_per_byte",
    "build_engine",
    "score",
    "stream",
]
