"""The audit of a whole database, beside a bare ordered scan of the tables that it reads.

Every payment is paid but one in a hundred, which was paid twice and whose second payment has gone back. The baseline
reads every row of the same tables in the order of their keys through the driver, and drops it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from sqlalchemy import insert, select

from benchmarks import machine
from paycore.app.clock import SystemClock
from paycore.bench.databases import Database, now_ms, opened
from paycore.bench.payments import CURRENCY, Cycle, Lot, amount_minor, trade_no
from paycore.cli.logs import configure_logs
from paycore.domain.verdicts import CaptureSource, NotifyOutcome, RefundState
from paycore.jobs.auditor import Auditor, Report
from paycore.metrics import Metrics
from paycore.store import tables
from paycore.store.engine import parse_database_url
from paycore.store.rows import ExcessRow, RefundResultRow, Stamp
from paycore.store.schema import open_store
from paycore.usecases.refund import RefundIntent, derive_refunds

TWICE_IN = 100
_ROWS_AT_ONCE = 10_000
AUDITED = ("merchant_order", "payment", "channel_order", "payment_outcome", "excess_payment", "refund", "refund_try")


class Audited(NamedTuple):
    """An audit. cpu_seconds: of its own process, a server's not counted."""

    report: Report
    seconds: float
    cpu_seconds: float


class Scanned(NamedTuple):
    """A bare scan of some tables."""

    rows: int
    seconds: float


class Figures(NamedTuple):
    """What came of it."""

    payments: int
    audited: Audited
    scanned: Scanned
    facts: Mapping[str, str]


def measure(store: str, db: str | None, payments: int, folder: Path, tell: Any) -> Figures:
    """Make a database, audit it, scan it."""
    lot = Lot(now_ms() - 86_400_000, payments, 1, paid=True, cycle=Cycle(TWICE_IN, 1, 0))
    with opened(store, db, folder) as database:
        database.write(lot, lambda done: tell(f"{done:,} of {payments:,} payments written"))
        pay_twice(database.url, lot)
        database.settle()
        tell("audit")
        audited = audit(database.url)
        tell("scan")
        scanned = together(scan_each(database, AUDITED), AUDITED)
        return Figures(payments, audited, scanned, database.facts())


def pay_twice(url: str, lot: Lot) -> None:
    """Write the second payments, each with its refund and the final word about it."""
    engine = parse_database_url(url).engine(writes=True)
    stamp = Stamp(lot.first_ms, lot.node, 2)
    with engine.connect() as connection:
        for ids in _portions(payment_id for place, payment_id in enumerate(lot.ids()) if place % TWICE_IN == 0):
            excess = [_excess(payment_id, stamp) for payment_id in ids]
            intents = [_intent(row, stamp) for row in excess]
            with connection.begin():
                for table, rows in _rows(excess, intents, stamp).items():
                    connection.execute(insert(tables.METADATA.tables[table]), [row._asdict() for row in rows])
    engine.dispose()


def _portions(ids: Iterator[int]) -> Iterator[list[int]]:
    portion: list[int] = []
    for payment_id in ids:
        portion.append(payment_id)
        if len(portion) == _ROWS_AT_ONCE:
            yield portion
            portion = []
    if portion:
        yield portion


def _excess(payment_id: int, stamp: Stamp) -> ExcessRow:
    at_ms = stamp.recorded_at_ms
    terms = (amount_minor(payment_id), CURRENCY, at_ms, at_ms, CaptureSource.NOTIFICATION)
    return ExcessRow(payment_id, 2, trade_no(payment_id, 2), NotifyOutcome.DUPLICATE, *terms, *stamp)


class _PaidByAnother(NamedTuple):
    """What the derivation of refunds asks of a payment's record."""

    outcome: bool = True

    def is_kept(self, _attempt: int, _trade_no: str) -> bool:
        return False


def _intent(row: ExcessRow, stamp: Stamp) -> RefundIntent:
    (intent,) = derive_refunds(_PaidByAnother(), [row], stamp)  # type: ignore[arg-type]  # all that is asked of it
    return intent


def _rows(excess: list[ExcessRow], intents: list[RefundIntent], stamp: Stamp) -> dict[str, Sequence[Any]]:
    tries = [one.first_try._replace(state=RefundState.REFUNDED, asks=1) for one in intents]
    words = [RefundResultRow(*one[:3], RefundState.REFUNDED, "", "", *stamp) for one in tries]
    refunds = [one.refund for one in intents]
    return {"excess_payment": excess, "refund": refunds, "refund_try": tries, "refund_result": words}


def audit(url: str) -> Audited:
    """Audit a whole database."""
    store = open_store(url)
    auditor = Auditor(store=store, clock=SystemClock(), metrics=Metrics())
    started_ns, cpu_started_ns = time.perf_counter_ns(), time.process_time_ns()
    report = asyncio.run(auditor.audit())
    seconds = (time.perf_counter_ns() - started_ns) / 1e9
    cpu_seconds = (time.process_time_ns() - cpu_started_ns) / 1e9
    store.dispose()
    return Audited(report, seconds, cpu_seconds)


def scan_each(database: Database, names: Iterable[str]) -> dict[str, Scanned]:
    """Read each table to its end."""
    scanned = {}
    for name in names:
        started_ns = time.perf_counter_ns()
        rows = database.scan(in_order(name))
        scanned[name] = Scanned(rows, (time.perf_counter_ns() - started_ns) / 1e9)
    return scanned


def together(scanned: Mapping[str, Scanned], names: Iterable[str]) -> Scanned:
    """The scan of these tables, one after another."""
    return Scanned(*map(sum, zip(*(scanned[name] for name in names), strict=True)))


def in_order(name: str) -> str:
    """The query for a table's rows in the order of its key."""
    table = tables.METADATA.tables[name]
    return str(select(table).order_by(*table.primary_key.columns))


def main(arguments: Sequence[str]) -> int:
    """Measure and print; ``--json`` prints one object instead."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks audit", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000, help="payments (default 1,000,000)")
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--db", help="a database of your own, empty")
    parser.add_argument("--folder", help="where files are made: a local disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    configure_logs("console", "warning")
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="paycore-bench-", dir=options.folder) as folder:
        figures = measure(options.store, options.db, options.count, Path(folder), console.log)
    if found := violations(figures.audited):
        print(f"no figures: {found}", file=sys.stderr)
        return 1
    if options.json:
        told = as_object(figures.payments, figures.audited, figures.scanned)
        described = {**machine.describe(), **figures.facts}
        print(json.dumps({"benchmark": "audit", "unit": "payments", **told, "machine": described}))
        return 0
    machine.show(Console())
    for name, value in figures.facts.items():
        print(f"{name:>12}  {value}")
    show(figures.payments, figures.audited, figures.scanned)
    return 0


def violations(audited: Audited) -> dict[str, int]:
    """What an audit found, which voids its figures: nothing is wrong in a database that was made for them."""
    return {str(kind): count for kind, count in audited.report.violation_counts.items() if count}


def show(payments: int, audited: Audited, scanned: Scanned) -> None:
    """Print an audit beside its baseline."""
    rate = payments / audited.seconds
    print(f"audit of {payments:,} payments: {audited.seconds:.1f} s, {rate:,.0f} payments/s")
    print(f"of which processor time of the audit's own process: {audited.cpu_seconds:.1f} s")
    print(f"bare scan of {scanned.rows:,} rows (the baseline): {scanned.seconds:.1f} s")
    print(f"the audit takes {audited.seconds / scanned.seconds:.2f} times as long")


def as_object(payments: int, audited: Audited, scanned: Scanned) -> dict[str, float]:
    """An audit and its baseline, as they stand in JSON."""
    return {
        "count": payments,
        "rate": payments / audited.seconds,
        "baseline_rate": payments / scanned.seconds,
        "audit_seconds": audited.seconds,
        "cpu_seconds": audited.cpu_seconds,
        "scan_seconds": scanned.seconds,
        "rows_scanned": scanned.rows,
    }
