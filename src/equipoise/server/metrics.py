"""The figures of a server and its service for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from types import MappingProxyType
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from equipoise.elastic.service import RankState, ServiceStatus

_TIMES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)

_TOTALS = MappingProxyType(
    {
        "submitted": "Requests taken.",
        "finished": "Requests whose last token was delivered.",
        "cancelled": "Requests ended by their clients.",
        "failed": "Requests that were given up.",
        "rerun": "Times that a request was run again on another rank.",
        "prompt_tokens": "Tokens of requests taken.",
        "generated_tokens": "Tokens delivered.",
        "steps": "Forward passes of the ranks together, in all generations.",
        "scalings": "Changes of the set of ranks that were asked for and done.",
        "recoveries": "Changes of the set of ranks that deaths made necessary, done.",
        "deaths": "Ranks that died.",
        "rebalances": "Plans carried out.",
        "moves": "Experts that travelled between ranks.",
    }
)


class HttpFigures:
    """Counts of the server itself.

    Args:
        registry: that they are in.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "equipoise_http_requests",
            "Requests answered, by endpoint and status.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "equipoise_http_requests_in_flight", "Requests being answered.", registry=registry
        )
        self.seconds = Histogram(
            "equipoise_http_request_seconds",
            "From a request to the end of its answer.",
            ["endpoint"],
            buckets=_TIMES,
            registry=registry,
        )
        self.first_token = Histogram(
            "equipoise_first_token_seconds",
            "From a request to its first token.",
            buckets=_TIMES,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "equipoise_between_tokens_seconds",
            "From one piece of an answer to the next, most of them one token.",
            buckets=_TIMES,
            registry=registry,
        )


class ServiceCollector(Collector):
    """Reads a service when it is scraped, on the scraper's thread.

    Args:
        read: returns how it is at the moment; None while there is none.
    """

    def __init__(self, read: Callable[[], ServiceStatus | None]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        """None: what it has is known when it is read. Collective: none."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of one moment. Collective: none."""
        status = self._read()
        ready = status is not None and status.ready
        yield GaugeMetricFamily("equipoise_ready", "Whether it serves.", value=float(ready))
        if status is None:
            return
        for name, what, value in (
            ("generation", "Number of the set of ranks that serves.", status.generation),
            ("queue_length", "Requests that wait for a rank.", status.queue_length),
            ("queue_limit", "As many may wait.", status.queue_limit),
            ("running", "Requests that ranks have.", status.running),
            ("changes_waiting", "Changes of the set of ranks that wait.", status.changes_waiting),
        ):
            yield GaugeMetricFamily(f"equipoise_service_{name}", what, value=float(value))
        if status.balancedness is not None:
            yield GaugeMetricFamily(
                "equipoise_service_balancedness",
                "Mean over max rank load as last planned, mean over layers.",
                value=status.balancedness,
            )
        yield _count_ranks(status)
        yield from _collect_ranks(status)
        for name, value in asdict(status.totals).items():
            yield CounterMetricFamily(
                f"equipoise_service_{name}", _TOTALS[name], value=float(value)
            )


def _count_ranks(status: ServiceStatus) -> Metric:
    ranks = GaugeMetricFamily("equipoise_service_ranks", "Ranks by state.", labels=["state"])
    for state in get_args(RankState):
        ranks.add_metric([state], sum(rank.state == state for rank in status.ranks))
    return ranks


def _collect_ranks(status: ServiceStatus) -> Iterator[Metric]:
    for name, what in (
        ("running", "Requests that a rank has."),
        ("room", "Requests that a rank could take at once."),
        ("near_deadline", "A rank's longest silence, as a share of its deadline."),
        ("pause_s", "Seconds without a step at a rank's last switch."),
    ):
        gauge = GaugeMetricFamily(f"equipoise_rank_{name}", what, labels=["rank"])
        for rank in status.ranks:
            gauge.add_metric([rank.name], float(getattr(rank, name)))
        yield gauge
