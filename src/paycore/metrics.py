"""What paycore tells Prometheus. A leaf: it knows prometheus-client, and of ours only what can be counted.

Everything on the notify path is counted once a group of notifications, never once a call.

One process keeps its values in memory. Several that share an address keep them in files, one set for each worker,
and whoever answers ``/metrics`` for all of them reads those (``GatheredMetrics``).
"""

import bisect
import struct
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values, write_to_textfile
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from paycore.domain.sweep import SweepKind

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Where the environment of a worker names the folder of the value files; prometheus-client reads it."""

_LATENCY_BUCKETS_NS = tuple(
    int(milliseconds * 1_000_000) for milliseconds in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
)

# A value file is there for a moment before it has a length.
_READ_TRIES = 20
_READ_PAUSE_SECONDS = 0.01

_Mode = Literal["livesum", "livemin", "mostrecent", "max"]


_AUDIT_VIOLATIONS = ("paycore_audit_violations", "Breaks of the money rules that the last audit found, by kind.")


class NotifyLabel(NamedTuple):
    """The labels of ``paycore_notify_total``. channel: a configured name, or ``unconfigured``."""

    channel: str
    outcome: str
    replayed: bool


class BulkHistogram(Histogram):
    """A histogram of durations that takes a whole group's observations at once."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        super().__init__(
            name, documentation, buckets=[limit_ns / 1e9 for limit_ns in _LATENCY_BUCKETS_NS], registry=registry
        )

    def observe_all_ns(self, durations_ns: Iterable[int]) -> None:
        """Add durations in nanoseconds."""
        counts: Tally[int] = Tally()
        sum_ns = 0
        for duration_ns in durations_ns:
            counts[bisect.bisect_left(_LATENCY_BUCKETS_NS, duration_ns)] += 1
            sum_ns += duration_ns
        for bucket, count in counts.items():
            self._buckets[bucket].inc(count)
        if counts:
            self._sum.inc(sum_ns / 1e9)

    def observe_same(self, duration_ns: int, count: int) -> None:
        """Add one duration in nanoseconds ``count`` times, as of notifications that came in one message."""
        if count > 0:
            self._buckets[bisect.bisect_left(_LATENCY_BUCKETS_NS, duration_ns)].inc(count)
            self._sum.inc(count * duration_ns / 1e9)


class Metrics:
    """Every metric of one process, in a registry of its own.

    shared_as: the name of a worker that keeps its values in files, in the folder that ``FOLDER_VARIABLE`` names. A
    successor of the same name goes on counting where its predecessor stopped. It sets how prometheus-client keeps
    values in the whole process: build one kind only.
    """

    def __init__(self, shared_as: str | None = None) -> None:
        # Said either way, so that a folder that the environment names for somebody else's programs is left alone.
        if shared_as is None:
            values.ValueClass = values.MutexValue
        else:
            values.ValueClass = values.MultiProcessValue(lambda: shared_as)  # type: ignore[no-untyped-call]  # as it is
        self._shared = shared_as is not None
        self._watched: list[tuple[Gauge, Callable[[], int]]] = []
        self.registry = CollectorRegistry()
        self._notify = Counter(
            "paycore_notify",
            "Notifications by what they turned out to be.",
            ["channel", "outcome", "replayed"],
            registry=self.registry,
        )
        self.notify_seconds = BulkHistogram(
            "paycore_notify_seconds", "From a notification's arrival in the queue to its commit.", self.registry
        )
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
        self._queue_depth = self._gauge("paycore_queue_depth", "Writes that wait for a commit.", "livesum")
        self._index_entries = self._gauge("paycore_index_entries", "Payments in the index.", "livesum")
        self._index_bytes = self._gauge("paycore_index_bytes", "Memory held by the index.", "livesum")
        self.index_evictions = Counter(
            "paycore_index_evictions", "Payments that left the index to make room.", registry=self.registry
        )
        self._refunds = Counter(
            "paycore_refunds",
            "Refunds by why they are owed and which state they reached.",
            ["reason", "state"],
            registry=self.registry,
        )
        # Read from the database by every worker: the latest reading is the truth, their sum would not be.
        self.quarantine_open = self._gauge(
            "paycore_quarantine_open", "Evidence in quarantine that nobody has resolved.", "mostrecent"
        )
        self.quarantine_oldest_open_age_seconds = self._gauge(
            "paycore_quarantine_oldest_open_age_seconds",
            "Age of the oldest evidence in quarantine that nobody has resolved; 0 when there is none.",
            "mostrecent",
        )
        self.quarantine_throttled = Counter(
            "paycore_quarantine_throttled",
            "Notifications refused because their source has filled its share of the quarantine.",
            ["channel"],
            registry=self.registry,
        )
        self.refund_oldest_unfinished_age_seconds = self._gauge(
            "paycore_refund_oldest_unfinished_age_seconds",
            "Age of the oldest refund without a final word; 0 when there is none.",
            "mostrecent",
        )
        self.refunds_need_attention = self._gauge(
            "paycore_refunds_need_attention",
            "Unfinished refunds that a person was told of, because they are old or refused each time.",
            "mostrecent",
        )
        self._job_success = self._job_gauge(
            "paycore_job_last_success_timestamp_seconds", "When a job last made a pass to its end.", "max"
        )
        self._job_lag = self._job_gauge(
            "paycore_job_lag_seconds", "How long the oldest work that is due has waited for a job.", "mostrecent"
        )
        self._job_failures = Counter(
            "paycore_job_failures", "Passes of a job that failed.", ["job"], registry=self.registry
        )
        self._job_items = Counter(
            "paycore_job_items",
            "Pieces of work that a job finished or put off.",
            ["job", "result"],
            registry=self.registry,
        )
        self.closed_unreachable = Counter(
            "paycore_closed_unreachable",
            "Payments closed although a channel gave no final word about an attempt for so long.",
            registry=self.registry,
        )
        self.attempts_given_up = Counter(
            "paycore_attempts_given_up",
            "Attempts that are asked about no more, although their channel gave no final word.",
            ["channel"],
            registry=self.registry,
        )
        self._sweep_found = Counter(
            "paycore_sweep_found",
            "What sweeps found missing or wrong; 0 in a healthy system.",
            ["kind"],
            registry=self.registry,
        )
        for kind in SweepKind:
            self._sweep_found.labels(kind.value)
        self._audit = Gauge(*_AUDIT_VIOLATIONS, ["kind"], multiprocess_mode="mostrecent", registry=self.registry)
        self.ready = self._gauge("paycore_ready", "1 while the database can be written.", "livemin")

    def _gauge(self, name: str, documentation: str, mode: _Mode) -> Gauge:
        """Make a gauge; mode: what several workers' values become together."""
        return Gauge(name, documentation, multiprocess_mode=mode, registry=self.registry)

    def _job_gauge(self, name: str, documentation: str, mode: _Mode) -> Gauge:
        return Gauge(name, documentation, ["job"], multiprocess_mode=mode, registry=self.registry)

    def count_job_pass(self, job: str, at_ms: int, *, done: int, put_off: int, lag_ms: int) -> None:
        """Take note of a pass that came to its end."""
        self._job_success.labels(job).set(at_ms / 1_000)
        self._job_lag.labels(job).set(lag_ms / 1_000)
        self._job_failures.labels(job)
        for result, count in (("done", done), ("put_off", put_off)):
            self._job_items.labels(job, result).inc(count)

    def set_audit_violations(self, counts: Mapping[str, int]) -> None:
        """Tell what the last whole audit found: every kind, with 0 where it found none."""
        for kind, count in counts.items():
            self._audit.labels(kind).set(count)

    def count_job_failure(self, job: str) -> None:
        """Take note of a pass that failed."""
        self._job_failures.labels(job).inc()

    def count_sweep_found(self, kind: SweepKind) -> None:
        """Add something that a sweep found."""
        self._sweep_found.labels(kind.value).inc()

    def count_notifications(self, counts: Mapping[NotifyLabel, int]) -> None:
        """Add one group's notifications."""
        for label, count in counts.items():
            self._notify.labels(label.channel, label.outcome, str(label.replayed).lower()).inc(count)

    def count_refunds(self, reason: str, state: str, count: int = 1) -> None:
        """Add refunds that reached a state."""
        self._refunds.labels(reason, state).inc(count)

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Read the queue's depth whenever the metrics are read."""
        self._watch(self._queue_depth, depth)

    def watch_index(self, entries: Callable[[], int], size_bytes: Callable[[], int]) -> None:
        """Read the index's size whenever the metrics are read."""
        self._watch(self._index_entries, entries)
        self._watch(self._index_bytes, size_bytes)

    def _watch(self, gauge: Gauge, read: Callable[[], int]) -> None:
        if self._shared:
            self._watched.append((gauge, read))
        else:
            gauge.set_function(read)

    def refresh(self) -> None:
        """Write down what is watched: a reader in another process cannot ask this one. Nothing to do in a lone one."""
        for gauge, read in self._watched:
            gauge.set(read())


class GatheredMetrics(Collector):
    """The metrics of all workers as one page, and of the workers themselves.

    folder: the one that their ``FOLDER_VARIABLE`` names. silence_seconds: how long the quietest worker that serves has
    told its supervisor nothing. restarts and serving are written by the supervisor.
    """

    def __init__(self, folder: str, silence_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self._silence_seconds = silence_seconds
        self._folder = folder
        self._values = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]  # as it is
        self._blank = Metrics().registry
        self.restarts = 0
        self.serving = 0

    def forget_living(self, worker: str) -> None:
        """Take a dead worker's queue, index and readiness out of the sums. What it counted stays."""
        mark_process_dead(worker, self._folder)  # type: ignore[no-untyped-call]  # as it is

    def collect(self) -> Iterator[Metric]:
        """Yield every metric: summed up over workers, or as it begins where no worker has one yet."""
        found = {family.name: family for family in self._read()}
        for blank in self._blank.collect():
            yield found.pop(blank.name) if blank.name in found else _without_birth(blank)
        yield from found.values()
        yield CounterMetricFamily(
            "paycore_worker_restarts", "Workers that were started in place of dead ones.", value=self.restarts
        )
        yield GaugeMetricFamily("paycore_workers", "Workers that take calls.", value=self.serving)
        yield GaugeMetricFamily(
            "paycore_worker_silence_seconds",
            "How long the quietest worker has told its supervisor nothing; they do each second.",
            value=self._silence_seconds(),
        )

    def _read(self) -> list[Metric]:
        for _ in range(_READ_TRIES):
            try:
                return list(self._values.collect())  # type: ignore[no-untyped-call]  # as it is
            except struct.error:
                time.sleep(_READ_PAUSE_SECONDS)
        raise RuntimeError(f"the workers' value files in {self._folder} cannot be read")


def _without_birth(family: Metric) -> Metric:
    """Leave out when the supervisor made the metric: no worker says that of its own."""
    family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    return family


def write_audit_file(path: str, counts: Mapping[str, int], payments: int, at_ms: int) -> None:
    """Write what an audit found as Prometheus reads it from a file, whole or not at all. Raises OSError."""
    registry = CollectorRegistry()
    violations = Gauge(*_AUDIT_VIOLATIONS, ["kind"], registry=registry)
    for kind, count in counts.items():
        violations.labels(kind).set(count)
    Gauge("paycore_audit_payments", "Payments that the last audit looked at.", registry=registry).set(payments)
    ended = Gauge("paycore_audit_timestamp_seconds", "When the last audit ended.", registry=registry)
    ended.set(at_ms / 1_000)
    write_to_textfile(path, registry)
