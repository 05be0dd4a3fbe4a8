"""Engines to compare, each in a process of its own that waits until it is asked for a round or for logits.

Idle processes use no CPU, so rounds of several can alternate; times are taken inside, without the pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from v4graph.errors import EngineError, V4GraphError
from v4graph_runtime.bench import Feed, Load, Side, Timed, check_load, session_side, time_round

STEPS = 4  # decoded tokens whose logits are compared, after the prompt's last
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class SideSpec:
    """What a process opens: an engine, a checkpoint in transformers, or a GGUF file in llama.cpp.

    `exact` is llama.cpp's: attention without flash attention, its cache in float32.
    """

    name: str
    kind: Literal["v4graph", "transformers", "llama.cpp"]
    path: Path
    checkpoint: Path | None = None
    exact: bool = False


@dataclass(frozen=True)
class Work:
    """What every process does: the load, the vocabulary its ids come from, and its threads."""

    load: Load
    vocab: int
    threads: int


@dataclass(frozen=True)
class Failure:
    """What a process answers when it cannot do what it was asked."""

    text: str


@dataclass(frozen=True)
class Round:
    """One round of one side; `elsewhere` is CPU time of other processes per second (None: not known)."""

    timed: Timed
    elsewhere: float | None


def open_side(spec: SideSpec, work: Work) -> Side:
    """Open a side in this process."""
    if spec.kind == "v4graph":
        from v4graph.checkpoint import Checkpoint
        from v4graph_runtime import Session
        from v4graph_runtime.ort_backend import OrtOptions

        assert spec.checkpoint is not None
        options = OrtOptions(threads=work.threads)
        session = Session(spec.path, Checkpoint.open(spec.checkpoint), options=options)
        check_load(session, work.load)
        return session_side(spec.name, session)
    if spec.kind == "transformers":
        from v4graph.verify.sides import transformers_side

        return transformers_side(spec.path, work.threads)
    from llama_side import LlamaSession

    capacity = max(work.load.prompt, work.load.context + work.load.tokens)
    llama = LlamaSession(spec.path, capacity=capacity, threads=work.threads, exact=spec.exact)
    return Side(spec.name, llama.reset, llama.append)


def logits(side: Side, feed: Feed, vocab: int) -> Logits:
    """Return the last logits of a prefill and those of a few tokens after it, [1 + STEPS, V]."""
    side.reset()
    pieces = [feed.prompt, *feed.steps[:STEPS]]
    return np.stack([np.array(side.append(ids), np.float32).reshape(-1, vocab)[-1] for ids in pieces])


def _serve(pipe: Connection, spec: SideSpec, work: Work) -> None:
    try:
        side, feed = open_side(spec, work), Feed.draw(work.load, work.vocab)
        pipe.send("ready")
        while (task := pipe.recv()) != "stop":
            begin = time.process_time()
            if task == "round":
                timed = time_round(side, feed)
                pipe.send((timed, time.process_time() - begin))
            else:
                pipe.send(logits(side, feed, work.vocab))
    except V4GraphError as error:
        pipe.send(Failure(str(error)))


class SideProcess:
    """A side in a process of its own; a context manager that ends it."""

    def __init__(self, spec: SideSpec, work: Work) -> None:
        """Start the process and wait until the side is open.

        Raises:
            EngineError: it could not be opened.
        """
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, spec, work), daemon=True)
        self._process.start()
        # Without this end of its own the far side's death would not be noticed.
        far.close()
        self._receive()

    def round(self) -> Round:
        """Time one round."""
        begin, busy = time.perf_counter(), busy_seconds()
        timed, own = self._ask("round")
        wall, after = time.perf_counter() - begin, busy_seconds()
        if busy is None or after is None:
            return Round(timed, None)
        return Round(timed, max(after - busy - own, 0.0) / wall)

    def logits(self) -> Logits:
        """Return logits to compare sides by, [1 + STEPS, V]."""
        found: Logits = self._ask("logits")
        return found

    def _ask(self, task: str) -> Any:
        self._pipe.send(task)
        return self._receive()

    def _receive(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError as error:
            raise EngineError(f"{self.spec.name}: its process stopped; see its error on stderr.") from error
        if isinstance(found, Failure):
            raise EngineError(f"{self.spec.name}: {found.text}")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_alive():
            self._pipe.send("stop")
        self._process.join()


def busy_seconds() -> float | None:
    """CPU seconds of all processes together since the start; None where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    spent = [int(fields[i]) for i in (1, 2, 3, 6, 7, 8)]
    return sum(spent) / os.sysconf("SC_CLK_TCK")
