"""What Prometheus reads at `/metrics`. Numbers only: no address, key, prompt or answer ever becomes a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.execution.errors import CallerFault, ExecutionFailed
from gateway.execution.streams import Running
from payments.money import NANO_PER_USD
from payments.tenders.base import Charge

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody reads

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
Gauges = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]
"""Rows of (name, help text, labels, value), read when Prometheus asks."""


class _GaugeCollector(Collector):
    def __init__(self, read: Gauges) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, text, labels, value in self._read():
            family = families.setdefault(name, GaugeMetricFamily(name, text, labels=list(labels)))
            family.add_metric(list(labels.values()), value)
        yield from families.values()


class Metrics:
    """The gateway's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"farebox_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Responses sent", "path", "status")
        self.seconds = Histogram(
            "farebox_request_seconds",
            "Time to the end of a response",
            ["path"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.payments_required = counter("payments_required", "402 answers, by reason", "code")
        self.replayed = counter("replayed", "Payments sent again that got their first answer")
        self.attempts = counter("attempts", "Attempts at candidates", "candidate", "status")
        self.charged_usd = counter("charged_usd", "Dollars charged", "model")
        self.credited_usd = counter("credited_usd", "Dollars paid beyond the charge, now payers' balance")
        self.tokens = counter("tokens", "Tokens billed", "model", "kind")

    def add_gauges(self, read: Gauges) -> None:
        """Also report what `read` returns at the time of asking."""
        self.registry.register(_GaugeCollector(read))

    def captured(self, running: Running, charge: Charge) -> None:
        """Count a request that was served."""
        model = running.candidate.model
        for attempt in running.attempts:
            self.attempts.labels(attempt.candidate_id, attempt.status).inc()
        self.charged_usd.labels(model).inc(charge.charged_nano_usd / NANO_PER_USD)
        self.credited_usd.inc(charge.credited_nano_usd / NANO_PER_USD)
        self.tokens.labels(model, "input").inc(running.usage.input_tokens)
        self.tokens.labels(model, "output").inc(running.usage.output_tokens)

    def released(self, failure: ExecutionFailed | CallerFault) -> None:
        """Count a request that nobody could serve."""
        for attempt in failure.attempts:
            self.attempts.labels(attempt.candidate_id, attempt.status).inc()

    def text(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self.registry)
