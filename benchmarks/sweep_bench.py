"""Both passes of the sweeper, beside a bare ordered scan of the tables that it compares.

The payments are those of the audit's benchmark: all are paid, and one in a hundred was paid twice, with its second
payment gone back. Nothing is missing, so whatever a pass finds makes the figures void. The incremental pass is timed
with nothing new, and after a burst of payments like these. The baseline reads every row of the same tables in the order
of their keys through the driver, and drops it. ``--audit`` audits the same database afterwards: to make one of ten
million payments takes longer than to sweep it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from sqlalchemy import insert

from benchmarks import audit_bench, machine
from benchmarks.audit_bench import AUDITED, TWICE_IN, Audited, Scanned, pay_twice, scan_each, together
from paycore.app.core import build_core
from paycore.app.jobs import build_jobs
from paycore.bench.databases import Database, now_ms, opened
from paycore.bench.payments import Cycle, Lot
from paycore.cli.logs import configure_logs
from paycore.domain.sweep import SweepKind
from paycore.jobs.runner import Job
from paycore.metrics import Metrics
from paycore.settings import load_settings
from paycore.store import tables
from paycore.store.engine import parse_database_url
from paycore.store.schema import open_store

_SWEPT = ("payment", "channel_order", "payment_outcome", "excess_payment", "refund", "refund_try", "task")
# Apart, so that the numbers that the database draws lie between or before them.
_OLD_NODE, _NEW_NODE = 500, 900
_IDLE_PASSES = 5


class Audit(NamedTuple):
    """The audit of the same database, and the scan of the tables that it reads."""

    audited: Audited
    scanned: Scanned


class Figures(NamedTuple):
    """What came of it, in seconds; what the system had in memory, it had."""

    payments: int
    burst: int
    full_seconds: float
    idle_seconds: float
    burst_seconds: float
    scanned: Scanned
    found: Mapping[str, int]
    audit: Audit | None
    facts: Mapping[str, str]


def measure(options: argparse.Namespace, folder: Path, tell: Any) -> Figures:
    """Make a database, sweep it, audit it if that is asked for, and scan it."""
    payments, burst = options.count, options.burst
    lot = _lot(now_ms() - 86_400_000, payments, _OLD_NODE)
    with opened(options.store, options.db, folder) as database:
        _write(database, lot, tell)
        metrics = Metrics()
        with _sweeper(database.url, metrics) as sweeper:
            tell("full pass")
            full_seconds = _timed(sweeper)
            tell("incremental passes")
            idle_seconds = min(_timed(sweeper) for _ in range(_IDLE_PASSES))
            _write(database, _lot(now_ms() - 10_000, burst, _NEW_NODE), tell)
            burst_seconds = _timed(sweeper)
        audited = None
        if options.audit:
            tell("audit")
            audited = audit_bench.audit(database.url)
        tell("scan")
        scanned = scan_each(database, dict.fromkeys((*_SWEPT, *(AUDITED if options.audit else ()))))
        times = (full_seconds, idle_seconds, burst_seconds, together(scanned, _SWEPT))
        audit = Audit(audited, together(scanned, AUDITED)) if audited else None
        return Figures(payments, burst, *times, _found(metrics), audit, database.facts())


def _lot(first_ms: int, size: int, node: int) -> Lot:
    return Lot(first_ms, size, node, paid=True, cycle=Cycle(TWICE_IN, 1, 0))


def _write(database: Database, lot: Lot, tell: Any) -> None:
    """Write payments as one writer, which is alive."""
    database.write(lot, lambda done: tell(f"{done:,} of {lot.size:,} payments written"))
    pay_twice(database.url, lot)
    engine = parse_database_url(database.url).engine(writes=True)
    with engine.connect() as connection, connection.begin():
        row = {"writer_no": lot.node, "started_at_ms": lot.first_ms, "seen_at_ms": now_ms()}
        connection.execute(insert(tables.writer), row)
    engine.dispose()
    database.settle()


@contextmanager
def _sweeper(url: str, metrics: Metrics) -> Iterator[Job]:
    settings = load_settings({"db": url})
    store = open_store(url)
    core = build_core(settings, store, metrics, lambda _healthy: None, warm_payments=0)
    try:
        (planned,) = build_jobs(settings, core, {"sweeper"})
        yield planned.job
    finally:
        core.writer.stop()
        store.dispose()


def _timed(job: Job) -> float:
    """Make passes until nothing is left that is due."""

    async def run() -> None:
        while (await job.run_once()).more:
            pass

    started_ns = time.perf_counter_ns()
    asyncio.run(run())
    return (time.perf_counter_ns() - started_ns) / 1e9


def _found(metrics: Metrics) -> dict[str, int]:
    name = "paycore_sweep_found_total"
    counts = {kind: metrics.registry.get_sample_value(name, {"kind": kind.value}) or 0 for kind in SweepKind}
    return {kind.value: int(count) for kind, count in counts.items() if count}


def main(arguments: Sequence[str]) -> int:
    """Measure and print; ``--json`` prints one object instead."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sweep", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="payments (default 1,000,000)")
    parser.add_argument("--burst", type=int, default=10_000, help="new payments for the incremental pass")
    parser.add_argument("--audit", action="store_true", help="audit the same database afterwards")
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--db", help="a database of your own, empty")
    parser.add_argument("--folder", help="where files are made: a local disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    configure_logs("console", "warning")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="paycore-bench-", dir=options.folder) as folder:
        figures = measure(options, Path(folder), console.log)
    if figures.found:
        print(f"no figures: the sweeper found {dict(figures.found)}", file=sys.stderr)
        return 1
    if figures.audit and (violations := audit_bench.violations(figures.audit.audited)):
        print(f"no figures: the audit found {violations}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(_as_object(figures)))
        return 0
    _show(figures)
    return 0


def _show(figures: Figures) -> None:
    machine.show(Console())
    for name, value in figures.facts.items():
        print(f"{name:>12}  {value}")
    rate = figures.payments / figures.full_seconds
    print(f"full pass over {figures.payments:,} payments: {figures.full_seconds:.1f} s, {rate:,.0f} payments/s")
    print(f"bare scan of {figures.scanned.rows:,} rows (the baseline): {figures.scanned.seconds:.1f} s")
    print(f"the full pass takes {figures.full_seconds / figures.scanned.seconds:.2f} times as long")
    print(f"incremental pass with nothing new: {figures.idle_seconds * 1_000:.0f} ms")
    print(f"incremental pass after {figures.burst:,} new payments: {figures.burst_seconds * 1_000:.0f} ms")

    if figures.audit:
        audit_bench.show(figures.payments + figures.burst, *figures.audit)


def _as_object(figures: Figures) -> dict[str, Any]:
    told: dict[str, Any] = {
        "benchmark": "sweep",
        "unit": "payments",
        "count": figures.payments,
        "rate": figures.payments / figures.full_seconds,
        "baseline_rate": (figures.payments + figures.burst) / figures.scanned.seconds,
        "burst": figures.burst,
        "full_seconds": figures.full_seconds,
        "idle_seconds": figures.idle_seconds,
        "burst_seconds": figures.burst_seconds,
        "scan_seconds": figures.scanned.seconds,
        "rows_scanned": figures.scanned.rows,
        "machine": {**machine.describe(), **figures.facts},
    }
    if figures.audit:
        told["audit"] = audit_bench.as_object(figures.payments + figures.burst, *figures.audit)
    return told
