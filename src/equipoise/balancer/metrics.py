"""The figures of a balancer for Prometheus; the one module that imports its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from equipoise.balancer.stats import EplbStats

_COUNTERS = MappingProxyType(
    {
        "rebalances": ("rebalances", "Plans carried out."),
        "moves": ("moves", "Experts received by a rank from another."),
        "transfer_bytes": ("bytes", "Bytes of experts between ranks."),
        "plan_seconds": ("plan_s", "Seconds of planning, on the slowest rank."),
        "transfer_seconds": ("transfer_s", "Seconds of moving, on the slowest rank."),
    }
)


class StatsCollector(Collector):
    """Reads a balancer when it is scraped, on the scraper's thread.

    Args:
        read: returns the figures of the moment.
    """

    def __init__(self, read: Callable[[], EplbStats]) -> None:
        self._read = read

    def describe(self) -> Iterator[Metric]:
        """The same, by which a registry finds that names are taken. Collective: none."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """All metrics, as of one moment. Collective: none."""
        stats = self._read()
        yield CounterMetricFamily(
            "equipoise_steps", "Forward passes closed by this rank.", value=stats.steps
        )
        yield GaugeMetricFamily(
            "equipoise_balancing",
            "1 while experts are kept balanced; 0 once that has ended and serving goes on without.",
            value=float(stats.failure is None),
        )
        for name, (field, what) in _COUNTERS.items():
            counter = CounterMetricFamily(f"equipoise_{name}", what, labels=["model"])
            for model, figures in stats.models.items():
                counter.add_metric([model], getattr(figures, field))
            yield counter
        balancedness = GaugeMetricFamily(
            "equipoise_balancedness",
            "Mean over max rank load, mean over layers: before and after the last rebalance on its "
            "window's load, and what the last measured one realised on the steps after it.",
            labels=["model", "placement"],
        )
        for model, figures in stats.models.items():
            if figures.balancedness_before is not None and figures.balancedness_after is not None:
                balancedness.add_metric([model, "before"], figures.balancedness_before)
                balancedness.add_metric([model, "after"], figures.balancedness_after)
            if figures.balancedness_realised is not None:
                balancedness.add_metric([model, "realised"], figures.balancedness_realised)
        yield balancedness


def register_stats(registry: CollectorRegistry, read: Callable[[], EplbStats]) -> StatsCollector:
    """Have a registry read these figures when it is scraped.

    Collective: none.
    Raises: ValueError if the registry has metrics of these names already.
    """
    collector = StatsCollector(read)
    registry.register(collector)
    return collector
