"""An engine that says what it is told to: scripted texts, delays and failures, for tests of the server."""

from __future__ import annotations

import asyncio
import codecs
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from v4graph.errors import BusyError
from v4graph_runtime.chat.format import BOS, CONTROL, EOS
from v4graph_runtime.request import Finish, Piece, RequestOptions, TokenLogprob
from v4graph_runtime.serving.stats import EngineStats
from v4graph_runtime.tokenizer import Tokenizer


def chat_tokenizer(*, control: bool = True) -> Tokenizer:
    """One token per byte, and one for each of the chat's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if control:
        core.add_special_tokens(list(CONTROL))
    return Tokenizer(core, bos_id=core.token_to_id(BOS) if control else None)


@dataclass
class Script:
    """What one request gets: a text, seconds before the first token and each other, a failure at its end.

    `hangs` is a request that goes on without a token until it is cancelled.
    """

    text: str
    wait: float = 0.0
    pace: float = 0.0
    error: Exception | None = None
    hangs: bool = False


@dataclass
class FakeEngine:
    """Gives the scripts in turn, the last one again and again.

    Attributes:
        busy: Raised by `submit`.
        submitted: Prompts as text, and the options that came with them.
    """

    scripts: list[Script | str]
    slots: int = 4
    capacity: int = 4096
    busy: Exception | None = None
    tokenizer: Tokenizer = field(default_factory=chat_tokenizer)
    submitted: list[tuple[str, RequestOptions]] = field(default_factory=list)

    def __post_init__(self) -> None:
        core = self.tokenizer.core
        self.eos = core.token_to_id(EOS)
        self.session: Any = SimpleNamespace(
            capacity=self.capacity,
            batch=self.slots,
            vocab_size=self.tokenizer.vocab_size,
            state_bytes=123_456,
            manifest=SimpleNamespace(config={"eos_token_id": self.eos}),
        )
        self.generations: list[FakeGeneration] = []
        self.closing = False
        self.began = time.monotonic()

    def say(self, *scripts: Script | str) -> None:
        """Begin again with other scripts."""
        self.scripts, self.generations, self.busy = list(scripts), [], None
        self.submitted.clear()

    def submit(self, prompt: Sequence[int], options: RequestOptions) -> FakeGeneration:
        if self.busy or self.closing:
            raise self.busy or BusyError("the engine is closing.")
        self.submitted.append((self.tokenizer.core.decode(list(prompt), skip_special_tokens=False), options))
        script = self.scripts[min(len(self.generations), len(self.scripts) - 1)]
        made = FakeGeneration(
            self, len(prompt), Script(script) if isinstance(script, str) else script, options
        )
        self.generations.append(made)
        return made

    def close(self, drain: float = 0.0) -> None:
        self.closing = True
        deadline = time.monotonic() + drain
        while self.stats().running and time.monotonic() < deadline:
            time.sleep(0.01)
        for one in self.generations:
            one.cancel()

    def stats(self) -> EngineStats:
        done = Counter(one.finish for one in self.generations if one.finish)
        return EngineStats(
            slots=self.slots,
            capacity=self.capacity,
            state_bytes=123_456,
            running=sum(not one.finish for one in self.generations),
            waiting=0,
            held_tokens=0,
            uptime=time.monotonic() - self.began,
            finished=dict(done),
            refused=0,
            prompt_tokens=sum(one.prompt_tokens for one in self.generations),
            cached_tokens=sum(one.cached_tokens for one in self.generations),
            generated_tokens=sum(one.new_tokens for one in self.generations),
            steps=0,
            busy_seconds=0.0,
            cache={"hits": 1, "bytes": 10},
        )


class FakeGeneration:
    def __init__(self, engine: FakeEngine, prompt: int, script: Script, options: RequestOptions) -> None:
        self._engine, self._script, self._options = engine, script, options
        self.id = f"fake-{len(engine.generations)}"
        self.prompt_tokens, self.cached_tokens = prompt, prompt // 2
        self.ids: list[int] = []
        self.finish: Finish = ""
        self.time_to_first_token = 0.0
        self.cancelled = False
        self._began = time.perf_counter()

    @property
    def new_tokens(self) -> int:
        return len(self.ids)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    def cancel(self) -> None:
        self.cancelled = True
        self.finish = self.finish or "cancelled"

    async def __aiter__(self) -> AsyncIterator[Piece]:
        tokens = self._engine.tokenizer.encode(self._script.text, start=False)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        await self._pause(self._script.wait)
        for token in tokens:
            if self.finish:
                break
            yield self._piece(token, decoder)
            if self.new_tokens == self._options.max_new_tokens:
                self.finish = "length"
            await self._pause(self._script.pace)
        while self._script.hangs and not self.finish:
            await self._pause(0.01)
        if self._script.error and not self.finish:
            self.finish = "error"
            raise self._script.error
        self.finish = self.finish or "stop"

    async def _pause(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while not self.finish:
            late = self._options.timeout and self.seconds > self._options.timeout
            if late:
                self.cancel()
            if time.perf_counter() >= end:
                return
            await asyncio.sleep(min(0.01, max(0.0, end - time.perf_counter())))

    def _piece(self, token: int, decoder: Any) -> Piece:
        self.time_to_first_token = self.time_to_first_token or self.seconds
        self.ids.append(token)
        core = self._engine.tokenizer.core
        added = core.get_added_tokens_decoder().get(token)
        if added:
            text = str(added.content) if self._options.special_tokens else ""
        else:
            byte = _BYTES[core.id_to_token(token)]
            text = decoder.decode(bytes([byte]))
        return Piece(token, text, self._logprob(token))

    def _logprob(self, token: int) -> TokenLogprob | None:
        if self._options.logprobs is None:
            return None
        others = (token, (token + 1) % 200, (token + 2) % 200)
        values = (-0.25, -2.0, -math.inf)
        return TokenLogprob(token, -0.25, tuple(zip(others, values, strict=True))[: self._options.logprobs])


def _alphabet() -> Iterator[tuple[str, int]]:
    from v4graph_runtime.serving.tokens import ALPHABET

    yield from ALPHABET.items()


_BYTES = dict(_alphabet())
