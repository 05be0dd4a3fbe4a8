"""GET /metrics: the engine's figures, and times of finished requests, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from v4graph_runtime.serving.engine import Engine
    from v4graph_runtime.serving.generation import Generation

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
# Field of EngineStats -> what it is.
GAUGES = {
    "slots": "Requests that can run at once",
    "running": "Requests that run",
    "waiting": "Requests that wait for a slot",
    "capacity": "Tokens that a slot can hold",
    "held_tokens": "Tokens in the states of the requests that run",
    "state_bytes": "Bytes of the states of all slots",
    "uptime": "Seconds since the engine started",
}
COUNTERS = {
    "refused": "Requests that were not taken",
    "prompt_tokens": "Prompt tokens of the requests that got a slot",
    "cached_tokens": "Prompt tokens that came from kept states",
    "generated_tokens": "Tokens generated",
    "steps": "Rounds of the engine loop",
    "busy_seconds": "Seconds in which the graph ran",
}
CACHE_GAUGES = ("bytes", "entries")


class _EngineCollector(Collector):
    """Reads the engine when it is asked, so nothing is counted twice."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"v4graph_{name}", f"{text}.", value=getattr(stats, name))
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"v4graph_{name}", f"{text}.", value=getattr(stats, name))
        requests = CounterMetricFamily("v4graph_requests", "Requests that ended, by why.", labels=["finish"])
        for finish in sorted({"stop", "length", "cancelled", "error", *stats.finished}):
            requests.add_metric([finish], stats.finished.get(finish, 0))
        yield requests
        for name, value in stats.cache.items():
            kind = GaugeMetricFamily if name in CACHE_GAUGES else CounterMetricFamily
            yield kind(f"v4graph_prefix_cache_{name}", f"Prefix cache: {name}.", value=value)


class Metrics:
    """The figures of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._first = Histogram(
            "v4graph_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._token = Histogram(
            "v4graph_time_per_output_token_seconds",
            "Between the tokens of a request, on average.",
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )

    def observe(self, one: Generation) -> None:
        """Count the times of a request that has ended."""
        if one.new_tokens:
            self._first.observe(one.time_to_first_token)
        if one.new_tokens > 1:
            self._token.observe((one.seconds - one.time_to_first_token) / (one.new_tokens - 1))

    def text(self) -> bytes:
        """Return them in Prometheus' text format."""
        return generate_latest(self._registry)
