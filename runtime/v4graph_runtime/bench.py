"""Times of prefill and decode through a Session, and the rate at which decoding reads weights."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from v4graph.errors import SessionError
from v4graph.manifest import Manifest
from v4graph_runtime import cpu_kernels
from v4graph_runtime.session import Session

Ids = npt.NDArray[np.int64]
READ_BYTES = 1 << 30


@dataclass(frozen=True)
class Load:
    """What is timed: `batch` slots, a `prompt`, then `tokens` decoded after `context` tokens of state."""

    batch: int = 1
    prompt: int = 512
    tokens: int = 64
    context: int = 512
    rounds: int = 5


@dataclass(frozen=True)
class Timed:
    """Seconds of a prefill and of one decoded token (of every slot)."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Side:
    """Something that is timed: `prefill` and `decode` append ids [B, S] to a state that `reset` empties."""

    name: str
    reset: Callable[[], None]
    append: Callable[[Ids], object]


def session_side(name: str, session: Session) -> Side:
    """Return a Session as a side."""
    return Side(name, session.reset, session.prefill)


@dataclass(frozen=True)
class Feed:
    """Random ids of a load: `prompt` and `context` [B, S], `steps` [tokens, B, 1]; context may be empty."""

    prompt: Ids
    context: Ids
    steps: Ids

    @classmethod
    def draw(cls, load: Load, vocab: int) -> Feed:
        """Draw the ids of a load, the same for the same load and vocabulary."""
        random = np.random.default_rng(0)
        prompt, context = (random.integers(0, vocab, (load.batch, n)) for n in (load.prompt, load.context))
        return cls(prompt, context, random.integers(0, vocab, (load.tokens, load.batch, 1)))


def time_round(side: Side, feed: Feed) -> Timed:
    """Time one prefill, and the decoded tokens after a context: their median."""
    side.reset()
    begin = time.perf_counter()
    side.append(feed.prompt)
    prefill = time.perf_counter() - begin
    side.reset()
    if feed.context.size:
        side.append(feed.context)
    times = []
    for ids in feed.steps:
        begin = time.perf_counter()
        side.append(ids)
        times.append(time.perf_counter() - begin)
    return Timed(prefill, statistics.median(times))


def median(rounds: Sequence[Timed]) -> Timed:
    """Return the median of each figure over the rounds."""
    return Timed(
        statistics.median(one.prefill for one in rounds), statistics.median(one.decode for one in rounds)
    )


def measure(
    sides: list[Side],
    load: Load,
    vocab: int,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Timed]:
    """Time every side in turn, round by round, after one round that does not count."""
    feed = Feed.draw(load, vocab)
    found: list[list[Timed]] = [[] for _ in sides]
    for turn in range(load.rounds + 1):
        for side, rounds in zip(sides, found, strict=True):
            report(side.name, turn, load.rounds + 1)
            rounds.append(time_round(side, feed))
    return [median(rounds[1:]) for rounds in found]


def check_load(session: Session, load: Load) -> None:
    """Refuse a load that the engine's state does not hold."""
    longest = max(load.prompt, load.context + load.tokens)
    if longest > session.capacity:
        raise SessionError(
            f"{session.engine_dir}: holds {session.capacity} tokens, the benchmark needs {longest}; choose a "
            "shorter --prompt or --context, or export with a larger --max-seq-len."
        )


def weight_bytes_per_token(manifest: Manifest, experts_per_token: int) -> int:
    """Bytes of weights that one decoded token reads: all but the embedding, and its own experts only."""
    sizes = {"bfloat16": 2, "float32": 4, "int8": 1, "int32": 4, "int64": 8}
    total = 0
    for binding in manifest.bindings:
        if binding.input == "embed.weight" or binding.input.endswith("tid2eid"):
            continue
        count = int(np.prod(binding.shape, dtype=np.int64)) * sizes[binding.dtype]
        if binding.experts:
            count = count // binding.experts * min(experts_per_token, binding.experts)
        total += count * max(len(binding.layers), 1)
    return total


def read_rate(threads: int, rounds: int = 5) -> float | None:
    """Bytes per second at which memory is read, median; None where the CPU kernels are not built."""
    path = cpu_kernels.library_path()
    if path is None:
        return None
    library = cpu_kernels.open_library(path)
    memory = np.ones(READ_BYTES // 8, np.int64)
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        library.v4graph_cpu_read(memory.ctypes.data, memory.nbytes, threads)
        times.append(time.perf_counter() - begin)
    return READ_BYTES / statistics.median(times)


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
