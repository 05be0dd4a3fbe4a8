"""Many requests on one session: `Engine` batches them; an OpenAI-compatible server is built on it."""

from v4graph_runtime.request import (
    Constraint,
    Finish,
    Piece,
    RequestOptions,
    TokenLogprob,
)
from v4graph_runtime.serving.dialogue import Dialogue, Reply
from v4graph_runtime.serving.engine import Engine, Limits
from v4graph_runtime.serving.generation import Generation
from v4graph_runtime.serving.stats import EngineStats

__all__ = [
    "Constraint",
    "Dialogue",
    "Engine",
    "EngineStats",
    "Finish",
    "Generation",
    "Limits",
    "Piece",
    "Reply",
    "RequestOptions",
    "TokenLogprob",
]
