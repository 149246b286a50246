"""What paycore tells Prometheus. A leaf: it knows prometheus-client and nothing of ours.

Everything on the notify path is counted once a group of notifications, never once a call.
"""

import bisect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

_LATENCY_BUCKETS_NS = tuple(
    int(milliseconds * 1_000_000) for milliseconds in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
)


class NotifyLabel(NamedTuple):
    """The labels of ``paycore_notify_total``. channel: a configured name, or ``unconfigured``."""

    channel: str
    outcome: str
    replayed: bool


class BulkHistogram(Collector):
    """A histogram of durations that takes a whole group's observations at once."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name = name
        self._documentation = documentation
        self._counts = [0] * (len(_LATENCY_BUCKETS_NS) + 1)
        self._sum_ns = 0
        self._lock = threading.Lock()

    def observe_all_ns(self, durations_ns: Iterable[int]) -> None:
        """Add durations in nanoseconds."""
        with self._lock:
            for duration_ns in durations_ns:
                self._counts[bisect.bisect_left(_LATENCY_BUCKETS_NS, duration_ns)] += 1
                self._sum_ns += duration_ns

    def collect(self) -> Iterator[Metric]:
        """Yield the histogram as Prometheus wants it: seconds, cumulative buckets."""
        with self._lock:
            counts, sum_ns = list(self._counts), self._sum_ns
        buckets, total = [], 0
        for limit_ns, count in zip((*_LATENCY_BUCKETS_NS, None), counts, strict=True):
            total += count
            buckets.append(("+Inf" if limit_ns is None else str(limit_ns / 1e9), total))
        family = HistogramMetricFamily(self._name, self._documentation)
        family.add_metric([], buckets, sum_ns / 1e9)
        yield family


class Metrics:
    """Every metric of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._notify = Counter(
            "paycore_notify",
            "Notifications by what they turned out to be.",
            ["channel", "outcome", "replayed"],
            registry=self.registry,
        )
        self.notify_seconds = BulkHistogram(
            "paycore_notify_seconds", "From a notification's arrival in the queue to its commit."
        )
        self.registry.register(self.notify_seconds)
        self.commit_group_size = Histogram(
            "paycore_commit_group_size",
            "Writes in one commit.",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 4_000),
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "paycore_commit_seconds",
            "One group's transaction, from begin to durable.",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        self.commit_failures = Counter(
            "paycore_commit_failures", "Groups that could not be committed.", ["cause"], registry=self.registry
        )
        self._queue_depth = Gauge("paycore_queue_depth", "Writes that wait for a commit.", registry=self.registry)
        self._index_entries = Gauge("paycore_index_entries", "Payments in the index.", registry=self.registry)
        self._index_bytes = Gauge("paycore_index_bytes", "Memory held by the index.", registry=self.registry)
        self._refunds = Counter(
            "paycore_refunds",
            "Refunds by why they are owed and which state they reached.",
            ["reason", "state"],
            registry=self.registry,
        )
        self.quarantine_open = Gauge(
            "paycore_quarantine_open", "Evidence in quarantine that nobody has resolved.", registry=self.registry
        )
        self.refund_oldest_unfinished_age_seconds = Gauge(
            "paycore_refund_oldest_unfinished_age_seconds",
            "Age of the oldest refund without a final word; 0 when there is none.",
            registry=self.registry,
        )
        self.ready = Gauge("paycore_ready", "1 while the database can be written.", registry=self.registry)

    def count_notifications(self, counts: Mapping[NotifyLabel, int]) -> None:
        """Add one group's notifications."""
        for label, count in counts.items():
            self._notify.labels(label.channel, label.outcome, str(label.replayed).lower()).inc(count)

    def count_refunds(self, reason: str, state: str, count: int = 1) -> None:
        """Add refunds that reached a state."""
        self._refunds.labels(reason, state).inc(count)

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Read the queue's depth whenever the metrics are read."""
        self._queue_depth.set_function(depth)

    def watch_index(self, entries: Callable[[], int], size_bytes: Callable[[], int]) -> None:
        """Read the index's size whenever the metrics are read."""
        self._index_entries.set_function(entries)
        self._index_bytes.set_function(size_bytes)
