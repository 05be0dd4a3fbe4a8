"""Run engines: state, sessions, sampling and text, with no torch and no exporter code.

onnxruntime, TensorRT, CUDA and tokenizers are imported when a session or a tokenizer is opened, not here.
"""

from v4graph_runtime.build import build_engine
from v4graph_runtime.constraint import Grammars, Matcher
from v4graph_runtime.evaluate import Score, bits_per_byte, score
from v4graph_runtime.generate import GenerateOptions, Stats, TextStream, stream
from v4graph_runtime.ort_backend import OrtOptions
from v4graph_runtime.prefix_cache import CacheStats, PrefixCache
from v4graph_runtime.request import Constraint
from v4graph_runtime.sampling import Sampler, token_logprob
from v4graph_runtime.sampling_options import SamplingOptions
from v4graph_runtime.session import Session
from v4graph_runtime.snapshot import Snapshot
from v4graph_runtime.stop_text import StopText
from v4graph_runtime.tokenizer import Tokenizer
from v4graph_runtime.trt_backend import TrtOptions

__all__ = [
    "CacheStats",
    "Constraint",
    "GenerateOptions",
    "Grammars",
    "Matcher",
    "OrtOptions",
    "PrefixCache",
    "Sampler",
    "SamplingOptions",
    "Score",
    "Session",
    "Snapshot",
    "Stats",
    "StopText",
    "TextStream",
    "Tokenizer",
    "TrtOptions",
    "bits_per_byte",
    "build_engine",
    "score",
    "stream",
    "token_logprob",
]
