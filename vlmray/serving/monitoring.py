"""Metrics of the gateway for Prometheus."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from vlmray.serving.backend import Reply

CLIENT_LEFT = 499  # no client sees it; it is what others count such requests as


@dataclass(slots=True)
class Count:
    """How a request is counted once it has ended."""

    model: str = ""
    """Set once it is known to exist. A client may not make up labels: each one is kept for good."""

    status: int | None = None
    """Set where it is another than the one that was sent: a stream may break, a client may leave."""

    def leave(self) -> None:
        """Note that the client has left, unless it has its answer."""
        self.status = self.status or CLIENT_LEFT


@dataclass(frozen=True, slots=True)
class Figures:
    """What a gateway has counted until now."""

    gateway: str
    """Its name; empty where there is only one, without Ray."""

    families: list[Metric]


def exposition(all_figures: Iterable[Figures]) -> bytes:
    """Write what several gateways have counted, each with its name as a label.

    Sums would fall when a gateway goes: a counter that falls reads as one that began anew.
    """
    merged: dict[str, Metric] = {}
    for figures in all_figures:
        label = {"gateway": figures.gateway} if figures.gateway else {}
        for family in figures.families:
            kept = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                kept.add_sample(sample.name, {**label, **sample.labels}, sample.value)
    families: Any = SimpleNamespace(collect=merged.values)
    return generate_latest(families)


class Metrics:
    """What Prometheus is told, by model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        make = functools.partial(self._make, labels=("model",))
        seconds = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
        self.requests = self._make(Counter, "requests", "Chat requests by status", labels=("model", "status"))
        self.num_in_flight = 0
        in_flight = self._make(Gauge, "requests_in_flight", "Chat requests in progress", labels=())
        in_flight.set_function(lambda: self.num_in_flight)
        self.queued = make(Gauge, "requests_queued", "Of those, the ones whose answer has not begun")
        self.latency = make(Histogram, "request_seconds", "Time to the whole answer", buckets=seconds)
        self.first_token = make(
            Histogram, "time_to_first_token_seconds", "Time to the first text of a stream", buckets=seconds
        )
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens read, visual ones included")
        self.completion_tokens = make(Counter, "completion_tokens", "Tokens written")
        self.batch_size = make(
            Histogram,
            "batch_size",
            "Requests in the forward pass of an answer",
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )

    def _make(self, kind: Any, name: str, text: str, labels: tuple[str, ...], **options: Any) -> Any:
        return kind(f"vlmray_{name}", text, labels, registry=self.registry, **options)

    @contextlib.contextmanager
    def in_progress(self) -> Iterator[None]:
        """Count a request as one in progress."""
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1

    def ended(self, model: str, status: int) -> None:
        """Count a request that has ended, answered or not."""
        self.requests.labels(model, status).inc()

    def count(self, model: str, reply: Reply) -> None:
        """Count one answer."""
        self.prompt_tokens.labels(model).inc(reply.completion.num_prompt_tokens)
        self.completion_tokens.labels(model).inc(reply.completion.num_completion_tokens)
        self.batch_size.labels(model).observe(reply.batch_size)
