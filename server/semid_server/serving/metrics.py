"""Everything that semid measures of itself, in one Prometheus registry.

Calls are counted in the `grpc_server_*` convention; what is semid's own begins with `semid_`.
Units are in the names; every series that can be known beforehand starts at 0.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from semid_server.serving.tally import Count, Counts, Tallies

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from prometheus_client.core import Metric

    from semid_server.serving.batcher import QueueState
    from semid_server.serving.device_use import DeviceUse
    from semid_server.serving.drift import LayerDrift
    from semid_server.serving.types import ServedModel

SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
ROWS = tuple(4**power for power in range(10))
REQUESTS = tuple(2**power for power in range(13))

OPERATIONS = ("encode", "decode")

TRANSPORTS = ("message", "shared_memory")

DRIFT: Final = frozenset(
    {"semid_code_perplexity", "semid_dead_codes", "semid_quantization_error_ratio"}
)
"""Families of code usage and quantisation error: see `drift_families`."""

Drift: TypeAlias = "Mapping[str, Sequence[LayerDrift]]"
"""What the last rows tell of each model, by layer."""

CALL = ("grpc_type", "grpc_service", "grpc_method")


class MethodMetrics:
    """The metrics of one method's calls, found once: looking them up costs as much as counting.

    Attributes
    ----------
    started : Count
        Of the calls that began.
    handling : Tally
        Of the seconds they took.
    ok : Count
        Of the calls that ended well.
    refused : Count
        Of those that were refused before their message was read, with the requests of others that
        found no room; of a method that has no queue, a count that nobody sees.
    """

    def __init__(self, metrics: Metrics, call: tuple[str, str, str]) -> None:
        self.started = metrics.started.labels(*call)
        self.handling = metrics.handling.labels(*call)
        self._handled, self._call = metrics.handled, call
        self._by_code: dict[grpc.StatusCode, Count] = {}
        self.ok = self.handled(grpc.StatusCode.OK)
        operation = call[-1].removesuffix("Stream").lower()
        self.refused = (
            metrics.refused_requests.labels(operation) if operation in OPERATIONS else Count()
        )

    def handled(self, code: grpc.StatusCode) -> Count:
        """Of the calls that ended with ``code``."""
        counter = self._by_code.get(code)
        if counter is None:
            counter = self._by_code[code] = self._handled.labels(*self._call, code.name)
        return counter


class _BatchMetrics:
    """What is counted of every batch of one operation, found once."""

    def __init__(self, metrics: Metrics, operation: str) -> None:
        self.rows = metrics.rows.labels(operation)
        self.batch_rows = metrics.batch_rows.labels(operation)
        self.batch_requests = metrics.batch_requests.labels(operation)
        self.device_seconds = metrics.device_seconds.labels(operation)
        self.queue_seconds = metrics.queue_seconds.labels(operation)
        self.failed_batches = metrics.failed_batches.labels(operation)


class Metrics:
    """The metrics of one server, and the observer of its batcher.

    Attributes
    ----------
    registry : prometheus_client.CollectorRegistry
        What the metrics endpoint exposes; one a server, so that tests may have several.
    """

    def __init__(self) -> None:
        # Each counter's creation time as a series of its own doubles the page for no use here.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        self.started = Counts(
            "grpc_server_started_total", "Calls that the server began.", CALL, registry=registry
        )
        self.handled = Counts(
            "grpc_server_handled_total",
            "Calls that the server ended, by status code.",
            (*CALL, "grpc_code"),
            registry=registry,
        )
        self.handling = Tallies(
            "grpc_server_handling_seconds",
            "Seconds from the first byte handled to the end of a call.",
            CALL,
            buckets=SECONDS,
            registry=registry,
        )
        self.rows = Counts("semid_rows_total", "Rows answered.", ("operation",), registry=registry)
        self.batch_rows = Tallies(
            "semid_batch_rows", "Rows in a batch.", ("operation",), buckets=ROWS, registry=registry
        )
        self.batch_requests = Tallies(
            "semid_batch_requests",
            "Requests that shared a batch.",
            ("operation",),
            buckets=REQUESTS,
            registry=registry,
        )
        self.queue_seconds = Tallies(
            "semid_queue_seconds",
            "Seconds that a request waited for its batch to begin.",
            ("operation",),
            buckets=SECONDS,
            registry=registry,
        )
        self.device_seconds = Tallies(
            "semid_device_seconds",
            "Seconds that a batch took on the device, copies included.",
            ("operation",),
            buckets=SECONDS,
            registry=registry,
        )
        self.queue_requests = Gauge(
            "semid_queue_requests", "Requests that wait for a batch.", registry=registry
        )
        self.queue_rows = Gauge(
            "semid_queue_rows", "Rows that wait for a batch.", registry=registry
        )
        self.queue_bytes = Gauge(
            "semid_queue_bytes", "Bytes that wait for a batch.", registry=registry
        )
        self.refused_requests = Counts(
            "semid_refused_requests_total",
            "Requests refused for lack of room or time.",
            ("operation",),
            registry=registry,
        )
        self.expired_requests = Counter(
            "semid_expired_requests_total",
            "Requests whose deadline passed, or could no longer be met, in the queue; nothing more "
            "was computed for them.",
            ("operation",),
            registry=registry,
        )
        self.withdrawn_requests = Counter(
            "semid_withdrawn_requests_total",
            "Requests whose caller left while they waited; nothing more was computed for them.",
            ("operation",),
            registry=registry,
        )
        self.failed_batches = Counter(
            "semid_failed_batches_total",
            "Batches that the device failed to run, or failed with a part of.",
            ("operation",),
            registry=registry,
        )
        self.verified_rows = Counter(
            "semid_verified_rows_total",
            "Rows encoded a second time by the float64 reference, as a check.",
            registry=registry,
        )
        self.verify_mismatches = Counter(
            "semid_verify_mismatches_total",
            "Verified rows whose codes differed from the float64 reference. Must stay 0.",
            registry=registry,
        )
        self.received_bytes = Counts(
            "semid_received_bytes_total",
            "Bytes of embeddings in requests to encode, by the way in which they came.",
            ("transport",),
            registry=registry,
        )
        self._received = {
            transport: self.received_bytes.labels(transport) for transport in TRANSPORTS
        }
        self.shared_memory_bytes = Gauge(
            "semid_shared_memory_bytes", "Bytes that callers share now.", registry=registry
        )
        self.shared_memory_segments = Gauge(
            "semid_shared_memory_segments",
            "Files in shared memory that callers share now.",
            registry=registry,
        )
        self.serving = Gauge(
            "semid_serving", "1 while the server takes requests, else 0.", registry=registry
        )
        self.model_info = Gauge(
            "semid_model_info",
            "The model that is served; always 1.",
            ("model", "fingerprint", "kind", "input_dim", "layers", "codebook_widths", "device"),
            registry=registry,
        )
        self.reloads = Counter(
            "semid_model_reloads_total",
            "Attempts to load a new version of a model while serving.",
            ("model", "result"),
            registry=registry,
        )
        self._shown: dict[str, tuple[str, ...]] = {}
        self._proved_rows = _ProvedRows()
        registry.register(self._proved_rows)
        self._drift = _Drift()
        registry.register(self._drift)
        self._device_use = _Device()
        registry.register(self._device_use)
        self._batches = {operation: _BatchMetrics(self, operation) for operation in OPERATIONS}
        for operation in OPERATIONS:
            for metric in (self.refused_requests, self.expired_requests, self.withdrawn_requests):
                metric.labels(operation)

    # -- the batcher's observer --------------------------------------------------------------

    def admitted(self, key: Hashable, rows: int) -> object:  # noqa: ARG002 - the observer's signature
        """Mark nothing: what is counted is counted when it ends."""
        return None

    def refused(self, key: Hashable) -> None:
        """Count a request that found no room."""
        self.refused_requests.labels(_operation(key)).value += 1

    def expired(self, key: Hashable) -> None:
        """Count a request whose deadline passed in the queue."""
        self.expired_requests.labels(_operation(key)).inc()

    def withdrawn(self, key: Hashable) -> None:
        """Count a request whose caller left."""
        self.withdrawn_requests.labels(_operation(key)).inc()

    def ran(
        self,
        key: Hashable,
        *,
        rows: int,
        answered: int,
        waits: Sequence[float],
        seconds: float,
        failed: bool,
        marks: Sequence[object],
    ) -> None:
        """Record a batch."""
        batches = self._batches[_operation(key)]
        if failed:
            batches.failed_batches.inc()
        batches.rows.value += answered
        batches.batch_rows.observe(rows)
        batches.batch_requests.observe(len(marks))
        batches.device_seconds.observe(seconds)
        for wait in waits:
            batches.queue_seconds.observe(wait)

    # -- calls -------------------------------------------------------------------------------

    def of_method(self, call: tuple[str, str, str]) -> MethodMetrics:
        """Return the metrics of a method's calls: of its ``grpc_type``, service and name."""
        return MethodMetrics(self, call)

    def expect_method(self, call: tuple[str, str, str], codes: Iterable[grpc.StatusCode]) -> None:
        """Start the series of a method at 0, so that rates exist from the first call on."""
        self.started.labels(*call)
        self.handling.labels(*call)
        for code in codes:
            self.handled.labels(*call, code.name)

    # -- the model and the queue -------------------------------------------------------------

    def watch_queue(self, state: Callable[[], QueueState]) -> None:
        """Have the queue's gauges read ``state`` at every scrape."""
        self.queue_requests.set_function(lambda: state().requests)
        self.queue_rows.set_function(lambda: state().rows)
        self.queue_bytes.set_function(lambda: state().nbytes)

    def watch_device(self, use: Callable[[], DeviceUse | None]) -> None:
        """Have the device's gauges read ``use`` at every scrape; no samples where it is None."""
        self._device_use.watch(use)

    def received(self, transport: str, nbytes: int) -> None:
        """Count embeddings that came."""
        self._received[transport].value += nbytes

    def watch_shared_memory(self, nbytes: Callable[[], int], segments: Callable[[], int]) -> None:
        """Have the gauges of shared memory read these at every scrape."""
        self.shared_memory_bytes.set_function(nbytes)
        self.shared_memory_segments.set_function(segments)

    def show_model(
        self,
        model: ServedModel,
        *,
        proved_rows: Callable[[], Mapping[str, int]],
        drift: Callable[[], Sequence[LayerDrift]],
    ) -> None:
        """Tell that this version of a model is served now, in place of the one before.

        Read at every scrape: ``proved_rows``, a method that tells its rows by the precision that
        proved their codes, and ``drift``, the figures of each layer.
        """
        labels = (
            model.name,
            model.fingerprint,
            model.kind,
            str(model.input_dim),
            str(len(model.codebook_widths)),
            ",".join(map(str, model.codebook_widths)),
            model.device,
        )
        if (before := self._shown.get(model.name)) is not None:
            self.model_info.remove(*before)
        self._shown[model.name] = labels
        self.model_info.labels(*labels).set(1)
        self._proved_rows.watch(model.name, proved_rows)
        self._drift.watch(model.name, drift)
        for result in ("ok", "failed"):
            self.reloads.labels(model.name, result)

    def drift(self) -> Drift:
        """Return what the families `DRIFT` are made of."""
        return self._drift.windows()

    def verified(self, rows: int, mismatches: int) -> None:
        """Count rows that were encoded again, and those that differed."""
        self.verified_rows.inc(rows)
        self.verify_mismatches.inc(mismatches)


@dataclass(slots=True)
class _Version:
    """A version of a model that may still encode, and the rows of it that were counted already."""

    model: str
    counts: weakref.WeakMethod[Callable[[], Mapping[str, int]]]
    counted: Mapping[str, int]


class _ProvedRows(Collector):
    """Rows by model and by the level of precision that proved their codes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of scrapes, which may be several at once
        self._current: dict[str, Callable[[], Mapping[str, int]]] = {}
        # One that was replaced still encodes for streams that began with it. They keep it.
        self._versions: list[_Version] = []
        self._totals: dict[str, dict[str, int]] = {}

    def watch(self, model: str, counts: Callable[[], Mapping[str, int]]) -> None:
        with self._lock:
            self._count()  # the version before, while it is surely there
            self._current[model] = counts
            self._versions.append(_Version(model, weakref.WeakMethod(counts), {}))
            self._totals.setdefault(model, {})

    def collect(self) -> Iterable[Metric]:
        """Yield the one family."""
        family = CounterMetricFamily(
            "semid_proved_rows_total",
            "Rows encoded, by the level of precision that proved their codes.",
            labels=("model", "level"),
        )
        with self._lock:
            self._count()
            for model, total in self._totals.items():
                for level, rows in total.items():
                    family.add_metric((model, level), rows)
        yield family

    def _count(self) -> None:
        """Add what each version has encoded since; forget those that are gone."""
        there: list[_Version] = []
        for version in self._versions:
            if (counts := version.counts()) is None:
                continue
            now, total = counts(), self._totals[version.model]
            for level, rows in now.items():
                total[level] = total.get(level, 0) + rows - version.counted.get(level, 0)
            version.counted = now
            there.append(version)
        self._versions = there


class _Drift(Collector):
    """Code usage and quantisation error of the last rows, by model and layer."""

    def __init__(self) -> None:
        self._sources: dict[str, Callable[[], Sequence[LayerDrift]]] = {}

    def watch(self, model: str, drift: Callable[[], Sequence[LayerDrift]]) -> None:
        self._sources[model] = drift

    def windows(self) -> Drift:
        return {model: drift() for model, drift in list(self._sources.items())}

    def collect(self) -> Iterable[Metric]:
        """Yield the three families."""
        yield from drift_families(self.windows())


def drift_families(drift: Drift) -> Iterable[Metric]:
    """Yield the families `DRIFT`, of what is told of each model."""
    labels = ("model", "layer")
    perplexity = GaugeMetricFamily(
        "semid_code_perplexity", "Perplexity of the codes of the last rows.", labels=labels
    )
    dead = GaugeMetricFamily(
        "semid_dead_codes", "Codes that none of the last rows has.", labels=labels
    )
    error = GaugeMetricFamily(
        "semid_quantization_error_ratio",
        "Share of the squared length of what a layer gets that it leaves, over sampled rows.",
        labels=labels,
    )
    for model, layers in drift.items():
        for number, layer in enumerate(layers):
            perplexity.add_metric((model, str(number)), layer.perplexity)
            dead.add_metric((model, str(number)), layer.dead_codes)
            error.add_metric((model, str(number)), layer.error)
    yield from (perplexity, dead, error)


class _Device(Collector):
    """Memory and utilisation of the device."""

    def __init__(self) -> None:
        self._use: Callable[[], DeviceUse | None] = lambda: None

    def watch(self, use: Callable[[], DeviceUse | None]) -> None:
        self._use = use

    def collect(self) -> Iterable[Metric]:
        """Yield the four families."""
        total = GaugeMetricFamily(
            "semid_device_memory_total_bytes", "Memory that the device has.", labels=("device",)
        )
        used = GaugeMetricFamily(
            "semid_device_memory_used_bytes",
            "Memory of the device that any process has.",
            labels=("device",),
        )
        reserved = GaugeMetricFamily(
            "semid_device_memory_reserved_bytes",
            "Memory of the device that this server has reserved for its tensors.",
            labels=("device",),
        )
        utilization = GaugeMetricFamily(
            "semid_device_utilization_ratio",
            "Share of the driver's last sampling period in which a kernel ran.",
            labels=("device",),
        )
        if (use := self._use()) is not None:
            total.add_metric((use.device,), use.total_bytes)
            used.add_metric((use.device,), use.used_bytes)
            reserved.add_metric((use.device,), use.reserved_bytes)
            if use.utilization is not None:
                utilization.add_metric((use.device,), use.utilization)
        yield from (total, used, reserved, utilization)


def _operation(key: Hashable) -> str:
    return str(getattr(key, "operation", "unknown"))
