"""Many clients at once, for minutes, and a server that is killed: nothing is lost and no answer changes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from engines import NANO, export_and_build
from serve_process import serve_process

from v4graph_export import ExportOptions
from v4graph_runtime import PrefixCache, Sampler, SamplingOptions, Session, Tokenizer, token_logprob

CLIENTS, SLOTS, SECONDS = 64, 8, 120
CAPACITY = 1024
TOLERANCE = 1e-4
HEADERS = {"Authorization": "Bearer secret"}


@dataclass(frozen=True)
class Asked:
    """A request, and what it gives alone: token ids, their log probabilities."""

    prompt: tuple[int, ...]
    new_tokens: int
    temperature: float
    seed: int
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()

    @property
    def sampling(self) -> SamplingOptions:
        return SamplingOptions(self.temperature, seed=self.seed)

    def body(self, **more: Any) -> dict[str, Any]:
        return {
            "model": "engine",
            "prompt": list(self.prompt),
            "max_tokens": self.new_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "logprobs": 0,
            **more,
        }


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano in exact numerics, whose logits do not depend on the schedule."""
    options = ExportOptions(numerics="exact", max_seq_len=CAPACITY)
    return export_and_build(tmp_path_factory.mktemp("load"), NANO, options)


def requests(count: int, longest: int) -> list[Asked]:
    """Prompts of 1 to `longest` tokens, some with the same beginning, greedy and sampled."""
    text = Tokenizer.load(NANO).encode((NANO / "heldout.txt").read_text("utf-8"))
    chance = random.Random(11)
    made = []
    for i in range(count):
        size = int(longest ** chance.random())
        start = chance.choice([0, 0, 5000, chance.randrange(len(text) - longest)])
        made.append(
            Asked(tuple(text[start : start + size]), chance.randint(1, 48), chance.choice([0.0, 0.0, 0.9]), i)
        )
    return made


def alone(engine: Path, asked: list[Asked]) -> list[Asked]:
    """Fill in what each request gives in a session of its own."""
    done = []
    with Session(engine, NANO) as session:
        for one in asked:
            session.reset()
            sample, ids, logprobs = Sampler(one.sampling, one.prompt), list[int](), list[float]()
            logits = session.prefill([one.prompt])[0]
            while True:
                ids.append(sample(logits))
                logprobs.append(token_logprob(logits, ids[-1], 0).logprob)
                if len(ids) == one.new_tokens:
                    break
                logits = session.decode([ids[-1]])[0]
            done.append(
                Asked(one.prompt, one.new_tokens, one.temperature, one.seed, tuple(ids), tuple(logprobs))
            )
    return done


def may_differ(engine: Path, one: Asked, at: int) -> bool:
    """Whether logits that differ by the tolerance can give another token at this place."""
    with Session(engine, NANO) as session:
        logits = session.prefill([[*one.prompt, *one.ids[:at]]])[0]
    noise = np.random.default_rng(0)
    for _ in range(500):
        sample = Sampler(one.sampling, one.prompt)
        for token in one.ids[:at]:
            # As many random numbers, as many counted tokens.
            sample(np.where(np.arange(len(logits)) == token, 0.0, -np.inf).astype(np.float32))
        near = logits + noise.uniform(-TOLERANCE, TOLERANCE, len(logits)).astype(np.float32)
        if sample(near) != one.ids[at]:
            return True
    return False


@dataclass
class Load:
    """Clients that ask again and again, and what they saw."""

    url: str
    asked: list[Asked]
    counts: Counter[str] = field(default_factory=Counter)
    differing: list[tuple[Asked, list[str], list[float]]] = field(default_factory=list)
    words: dict[int, str] = field(default_factory=dict)

    async def run(self, seconds: float) -> None:
        limits = httpx2.Limits(max_connections=CLIENTS + 4)
        async with httpx2.AsyncClient(base_url=self.url, headers=HEADERS, timeout=120, limits=limits) as http:
            end = time.monotonic() + seconds
            await asyncio.gather(*(self._client(http, i, end) for i in range(CLIENTS)))

    async def _client(self, http: httpx2.AsyncClient, number: int, end: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            one = chance.choice(self.asked)
            if chance.random() < 0.1:
                await self._leave(http, one, chance)
            else:
                await self._ask(http, one)

    async def _ask(self, http: httpx2.AsyncClient, one: Asked) -> None:
        answer = await http.post("/v1/completions", json=one.body())
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        tokens, logprobs = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        assert len(tokens) == one.new_tokens and choice["finish_reason"] == "length"
        self.counts["answers"] += 1
        self.counts["tokens"] += len(tokens)
        self._compare(one, tokens, logprobs)

    async def _leave(self, http: httpx2.AsyncClient, one: Asked, chance: random.Random) -> None:
        """Go away after some events, or before the first."""
        stay = chance.randint(0, 3)
        body = one.body(stream=True, max_tokens=CAPACITY - len(one.prompt))
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            events = 0
            async for _ in answer.aiter_lines():
                events += 1
                if events > stay:
                    break
        self.counts["left"] += 1

    def _compare(self, one: Asked, tokens: list[str], logprobs: list[float]) -> None:
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if token != self.words[one.ids[i]]:
                self.differing.append((one, tokens[:i], logprobs))
                return
            assert logprob == pytest.approx(one.logprobs[i], abs=TOLERANCE)


def words_of(asked: list[Asked], url: str) -> dict[int, str]:
    """Return how the server writes each token that can come."""
    ids = sorted({token for one in asked for token in one.ids})
    with httpx2.Client(base_url=url, headers=HEADERS) as http:
        return {token: http.post("/detokenize", json={"tokens": [token]}).json()["prompt"] for token in ids}


@pytest.mark.slow
def test_64_clients_get_for_two_minutes_what_each_would_get_alone(engine: Path, tmp_path: Path) -> None:
    asked = alone(engine, requests(120, 700))
    options = ("--slots", SLOTS, "--max-waiting", 4 * CLIENTS, "--prefix-cache-bytes", 200_000_000)
    with serve_process(engine, NANO, *options) as server:
        url = server.url
        load = Load(url, asked, words=words_of(asked, url))
        asyncio.run(load.run(SECONDS))
        with httpx2.Client(base_url=url, headers=HEADERS) as http:
            deadline = time.monotonic() + 10
            while (stats := http.get("/stats").json())["running"] or stats["waiting"]:
                assert time.monotonic() < deadline, stats
                time.sleep(0.05)
            # Every slot can still be used.
            body = {**asked[0].body(), "prompt": [list(asked[0].prompt)] * SLOTS}
            assert len(http.post("/v1/completions", json=body, timeout=60).json()["choices"]) == SLOTS
    print(
        f"{load.counts['answers']} answers, {load.counts['tokens']} tokens, {load.counts['left']} clients "
        f"left early, {len(load.differing)} tokens within {TOLERANCE} of another"
    )
    assert load.counts["answers"] > CLIENTS and load.counts["left"] > 0
    for one, same, _ in load.differing:
        assert may_differ(engine, one, len(same)), (one, same)


@pytest.mark.slow
def test_a_server_that_is_killed_under_load_starts_again_with_its_cache(engine: Path, tmp_path: Path) -> None:
    folder, chance = tmp_path / "cache", random.Random(5)
    asked = alone(engine, requests(30, 400))
    options = ("--slots", 4, "--prefix-cache", folder, "--prefix-cache-bytes", 100_000_000)
    for _ in range(6):
        with serve_process(engine, NANO, *options) as server:
            load = Load(server.url, asked, words=words_of(asked, server.url))

            async def until_killed(load: Load = load, process: Any = server.process) -> None:
                async def kill() -> None:
                    await asyncio.sleep(chance.uniform(0.3, 2.0))
                    process.kill()

                killing = asyncio.create_task(kill())
                with contextlib.suppress(httpx2.HTTPError):
                    await load.run(10)
                await killing

            asyncio.run(until_killed())
            assert not load.differing
    assert list(folder.iterdir())
    kept = PrefixCache(folder).stats
    assert kept.entries > 0 and kept.ignored == 0
    # Files that are none of ours, or no longer, are told of and left alone.
    whole = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    (folder / f"{'0' * 64}.safetensors").write_bytes(whole.read_bytes()[:-9])
    with serve_process(engine, NANO, *options) as server:
        url = server.url
        load = Load(url, asked, words=words_of(asked, url))
        asyncio.run(load.run(2))
        with httpx2.Client(base_url=url, headers=HEADERS) as http:
            cache = http.get("/stats").json()["cache"]
        assert cache["ignored"] >= 1 and cache["hits"] > 0
    assert load.counts["answers"] > 0 and not load.differing
