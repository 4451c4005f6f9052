"""What Prometheus reads at a facilitator's `/metrics`: calls, results by the protocol's own words, and what is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
Gauges = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]
"""Rows of (name, help text, labels, value), read when Prometheus asks."""


class FacilitatorMetrics(Collector):
    """The counters of one facilitator, in a registry of their own."""

    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges
        self._registry = CollectorRegistry()
        self._registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"farebox_facilitator_{name}", text, labels, registry=self._registry)

        self._calls = counter("calls", "Answers sent", "path", "status")
        self._verifications = counter("verifications", "Answers of /verify, by reason", "result")
        self._settlements = counter("settlements", "Answers of /settle, by reason", "result")
        self._seconds = Histogram(
            "farebox_facilitator_seconds", "Time to an answer", ["path"], registry=self._registry, buckets=SECONDS
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._calls.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def verified(self, answer: dict[str, Any]) -> None:
        """Count what `/verify` said."""
        self._verifications.labels("valid" if answer["isValid"] else answer["invalidReason"]).inc()

    def settled(self, answer: dict[str, Any]) -> None:
        """Count what `/settle` said."""
        self._settlements.labels("success" if answer["success"] else answer["errorReason"]).inc()

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For prometheus_client: the gauges."""
        families: dict[str, GaugeMetricFamily] = {}
        for name, text, labels, value in self._gauges():
            family = families.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_metric(list(labels.values()), value)
        yield from families.values()
