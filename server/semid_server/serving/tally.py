"""Counters and histograms that are written from one place, and cost no more than that needs.

Those of `prometheus_client` may be written by any thread at any time. That takes a few microseconds
and a lock or two for each number, and every request here has nearly a dozen: about a tenth of all
that Python does for a small request. These take no lock: each is written by one thread at a time,
and a scrape at the same moment may miss the number that is being written.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


T = TypeVar("T")


class _Family(Collector, Generic[T]):
    """What is counted under one name, once for each combination of its labels' values."""

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        *,
        new: Callable[[], T],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._new = new
        self._members: dict[tuple[str, ...], T] = {}
        registry.register(self)

    def labels(self, *values: str) -> T:
        """Return the member of these values, which is there from now on."""
        return self._members.setdefault(values, self._new())


class Count:
    """One counter."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1) -> None:
        """Count so many more."""
        self.value += amount


class Counts(_Family[Count]):
    """A family of counters, one for each combination of its labels' values.

    Parameters
    ----------
    name, documentation : str
        As Prometheus shows them.
    labels : sequence of str
        Names of the labels.
    registry : CollectorRegistry
        Where it registers itself.
    """

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], *, registry: CollectorRegistry
    ) -> None:
        super().__init__(name, documentation, labels, new=Count, registry=registry)

    def collect(self) -> Iterable[Metric]:
        """Yield the family."""
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, count in list(self._members.items()):
            family.add_metric(values, count.value)
        yield family


class Tally:
    """One histogram: how many numbers fell into which bucket, and their sum."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a number."""
        # The first bucket whose upper bound it does not exceed.
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Tallies(_Family[Tally]):
    """A family of histograms, one for each combination of its labels' values.

    Parameters
    ----------
    name, documentation : str
        As Prometheus shows them.
    labels : sequence of str
        Names of the labels.
    buckets : sequence of float
        Upper bounds, ascending, without infinity.
    registry : CollectorRegistry
        Where it registers itself.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._named = [*map(floatToGoString, buckets), "+Inf"]
        super().__init__(name, documentation, labels, new=lambda: Tally(buckets), registry=registry)

    def collect(self) -> Iterable[Metric]:
        """Yield the family."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, tally in list(self._members.items()):
            counts = [float(count) for count in accumulate(tally.counts)]
            buckets = list(zip(self._named, counts, strict=True))
            family.add_metric(values, buckets, tally.total)
        yield family
