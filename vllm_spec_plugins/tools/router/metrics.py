# SPDX-License-Identifier: Apache-2.0
"""The router's Prometheus metrics, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Shown(Protocol):
    """An upstream, as the metrics show it."""

    name: str
    running: int
    waiting: int

    @property
    def available(self) -> bool: ...


class Metrics:
    """Counters by stage and upstream; names start with ``vllm_spec_router_``."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "vllm_spec_router"
        each = ["stage", "upstream"]
        self._requests = Counter(
            f"{prefix}_requests", "Requests by what became of them", ["outcome", "stage"], registry=self.registry
        )
        self._attempts = Counter(f"{prefix}_attempts", "Calls of upstreams", [*each, "outcome"], registry=self.registry)
        self._tokens = Counter(
            f"{prefix}_tokens", "Tokens of completed calls", [*each, "direction"], registry=self.registry
        )
        self._cost = Counter(f"{prefix}_cost", "Cost of completed calls", each, registry=self.registry)
        self._seconds = Histogram(
            f"{prefix}_seconds",
            "From a request to the end of its answer",
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
        )
        self._unjudged = Counter(
            f"{prefix}_unjudged",
            "Answers whose judgement failed; the next stage was asked",
            ["stage"],
            registry=self.registry,
        )
        self._up = Gauge(f"{prefix}_upstream_up", "1: takes requests", ["upstream"], registry=self.registry)
        self._running = Gauge(f"{prefix}_running", "Calls under way", ["upstream"], registry=self.registry)
        self._waiting = Gauge(f"{prefix}_waiting", "Calls in the queue", ["upstream"], registry=self.registry)

    def attempt(
        self, stage: str, upstream: str, outcome: str, input_tokens: int, output_tokens: int, cost: float
    ) -> None:
        self._attempts.labels(stage, upstream, outcome).inc()
        self._tokens.labels(stage, upstream, "input").inc(input_tokens)
        self._tokens.labels(stage, upstream, "output").inc(output_tokens)
        self._cost.labels(stage, upstream).inc(cost)

    def request(self, outcome: str, stage: str, seconds: float) -> None:
        self._requests.labels(outcome, stage).inc()
        self._seconds.observe(seconds)

    def unjudged(self, stage: str) -> None:
        self._unjudged.labels(stage).inc()

    def render(self, upstreams: Iterable[Shown]) -> bytes:
        """Prometheus' text format, with the upstreams as they are now."""
        for upstream in upstreams:
            self._up.labels(upstream.name).set(upstream.available)
            self._running.labels(upstream.name).set(upstream.running)
            self._waiting.labels(upstream.name).set(upstream.waiting)
        return generate_latest(self.registry)
