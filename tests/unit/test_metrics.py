"""Metrics: what a group's durations become, and several processes' values as one page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from paycore.metrics import FOLDER_VARIABLE, GatheredMetrics, Metrics, NotifyLabel
from tests.support.server import clean_environment

MILLISECOND_NS = 1_000_000

WORKER = """
import sys
from paycore.metrics import Metrics, NotifyLabel
name, count, queue, ready, quarantine = sys.argv[1], *map(int, sys.argv[2:])
metrics = Metrics(name)
metrics.watch_queue(lambda: queue)
metrics.watch_index(lambda: 10 * queue, lambda: 100 * queue)
metrics.count_notifications({NotifyLabel("simbank", "ACCEPTED", False): count})
metrics.notify_seconds.observe_same(1_500_000, count)
metrics.notify_seconds.observe_all_ns([7_000_000] * count)
metrics.quarantine_throttled.labels("simbank").inc(count)
metrics.index_evictions.inc(count)
metrics.ready.set(ready)
metrics.quarantine_open.set(quarantine)
metrics.refresh()
"""

NOTIFIED = 'paycore_notify_total{channel="simbank",outcome="ACCEPTED",replayed="false"}'


def run_worker(folder: Path, *arguments: object) -> None:
    environment = clean_environment({FOLDER_VARIABLE: str(folder)})
    subprocess.run([sys.executable, "-c", WORKER, *map(str, arguments)], env=environment, check=True)


def page(registry: CollectorRegistry) -> dict[str, float]:
    """Every sample but the times of birth, by its name and labels as Prometheus writes them."""
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    pairs = [line.rpartition(" ") for line in lines]
    return {name: float(value) for name, _, value in pairs if "_created" not in name}


def gathered(folder: Path) -> tuple[GatheredMetrics, CollectorRegistry]:
    collector, registry = GatheredMetrics(str(folder)), CollectorRegistry()
    registry.register(collector)
    return collector, registry


def families(registry: CollectorRegistry) -> dict[str, tuple[str, str]]:
    parsed = text_string_to_metric_families(generate_latest(registry).decode())
    return {one.name: (one.type, one.documentation) for one in parsed if not one.name.endswith("_created")}


def test_histogram_by_group_is_what_single_observations_make() -> None:
    durations_ms = [0, 1, 2, 3, 7, 7, 150, 9_999, 10_000, 60_000]
    durations_ns = [milliseconds * MILLISECOND_NS for milliseconds in durations_ms]
    single, grouped, same = Metrics(), Metrics(), Metrics()
    for duration_ns in durations_ns:
        single.notify_seconds.observe(duration_ns / 1e9)
        same.notify_seconds.observe_same(duration_ns, 1)
    grouped.notify_seconds.observe_all_ns(durations_ns)
    expected = page(single.registry)
    assert expected["paycore_notify_seconds_count"] == len(durations_ms)
    assert expected['paycore_notify_seconds_bucket{le="0.001"}'] == 2
    assert page(grouped.registry) == expected
    assert page(same.registry) == expected


def test_histogram_of_the_same_duration_counts_each() -> None:
    metrics = Metrics()
    metrics.notify_seconds.observe_same(7 * MILLISECOND_NS, 10_000)
    metrics.notify_seconds.observe_same(7 * MILLISECOND_NS, 0)
    said = page(metrics.registry)
    assert said['paycore_notify_seconds_bucket{le="0.005"}'] == 0
    assert said['paycore_notify_seconds_bucket{le="0.01"}'] == 10_000
    assert said["paycore_notify_seconds_sum"] == 70


def test_lone_process_reads_what_is_watched_when_it_is_asked() -> None:
    metrics, depth = Metrics(), [1]
    metrics.watch_queue(lambda: depth[0])
    depth[0] = 5
    assert page(metrics.registry)["paycore_queue_depth"] == 5


def test_workers_are_gathered_by_sum_minimum_and_latest_reading(tmp_path: Path) -> None:
    run_worker(tmp_path, "1", 100, 3, 1, 8)
    run_worker(tmp_path, "2", 20, 4, 0, 9)
    _, registry = gathered(tmp_path)
    said = page(registry)
    assert said[NOTIFIED] == 120
    assert said['paycore_notify_seconds_bucket{le="0.002"}'] == 120
    assert said['paycore_notify_seconds_bucket{le="0.01"}'] == 240
    assert said["paycore_notify_seconds_count"] == 240
    assert said['paycore_quarantine_throttled_total{channel="simbank"}'] == 120
    assert said["paycore_index_evictions_total"] == 120
    assert said["paycore_queue_depth"] == 7
    assert (said["paycore_index_entries"], said["paycore_index_bytes"]) == (70, 700)
    assert said["paycore_ready"] == 0
    assert said["paycore_quarantine_open"] == 9


def test_dead_worker_leaves_its_counts_and_takes_its_queue_along(tmp_path: Path) -> None:
    run_worker(tmp_path, "1", 100, 3, 1, 8)
    run_worker(tmp_path, "2", 20, 4, 0, 9)
    collector, registry = gathered(tmp_path)
    collector.forget_living("2")
    said = page(registry)
    assert said[NOTIFIED] == 120
    assert (said["paycore_queue_depth"], said["paycore_ready"], said["paycore_quarantine_open"]) == (3, 1, 9)


def test_successor_counts_on_where_the_dead_worker_stopped(tmp_path: Path) -> None:
    run_worker(tmp_path, "1", 100, 3, 1, 8)
    collector, registry = gathered(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    collector.forget_living("1")
    run_worker(tmp_path, "1", 1, 2, 1, 8)
    said = page(registry)
    assert said[NOTIFIED] == 101
    assert said["paycore_queue_depth"] == 2
    # However often workers die: no more files.
    assert {path.name for path in tmp_path.iterdir()} == files


def test_gathered_page_names_what_a_lone_process_names(tmp_path: Path) -> None:
    lone = Metrics()
    _, registry = gathered(tmp_path)
    own = {"paycore_worker_restarts", "paycore_workers", "paycore_worker_silence_seconds"}
    before_any_worker = families(registry)
    assert before_any_worker.keys() - own == families(lone.registry).keys()
    run_worker(tmp_path, "1", 1, 1, 1, 1)
    assert families(registry) == before_any_worker
    assert page(registry)["paycore_workers"] == 0


def test_folder_named_for_other_programs_is_left_alone(tmp_path: Path) -> None:
    program = "from paycore.metrics import Metrics; Metrics().index_evictions.inc()"
    environment = clean_environment({FOLDER_VARIABLE: str(tmp_path)})
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_lone_process_are_counted() -> None:
    metrics = Metrics()
    metrics.count_notifications({NotifyLabel("simbank", "ACCEPTED", False): 3})
    metrics.count_refunds("DUPLICATE", "PENDING", 2)
    said = page(metrics.registry)
    assert said[NOTIFIED] == 3
    assert said['paycore_refunds_total{reason="DUPLICATE",state="PENDING"}'] == 2
