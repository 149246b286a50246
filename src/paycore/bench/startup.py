"""Warm starts: how fast a server reads the payments of its database into the index.

The limit is a bare ordered scan of the same columns through the same driver, the rows dropped as they come. The
baseline is reading records of some hundred payments and putting them into the index one by one. The latency is that of
`paycore serve`, from its start until calls are taken.
"""

import time
from pathlib import Path
from typing import NamedTuple

from paycore._dedupe import Index
from paycore.bench.databases import Database, now_ms, opened
from paycore.bench.payments import CHANNEL, ROWS_A_STEP, Lot, account
from paycore.bench.processes import paycore_server
from paycore.bench.result import CountError, Progress, Result, Row, percentile_ms
from paycore.domain.money import CURRENCY_CODES
from paycore.store.rows import Stamp
from paycore.store.schema import open_store
from paycore.usecases.warm import warm

AGE_MS = 60_000
RECORDS_A_READ = 500
MAX_BASELINE = 20_000
CODES = {(CHANNEL, account(attempt)): attempt for attempt in (1, 2, 3)}
PAYMENTS = (
    "SELECT payment.payment_id, payment.amount_minor, payment.currency, payment.expire_at_ms, payment_outcome.state,"
    " payment_outcome.attempt FROM payment LEFT JOIN payment_outcome ON payment_outcome.payment_id = payment.payment_id"
    " ORDER BY payment.payment_id DESC"
)
SCANS = (
    PAYMENTS,
    "SELECT payment_id, attempt, channel, account FROM channel_order ORDER BY payment_id, attempt",
    "SELECT payment_id, attempt FROM excess_payment ORDER BY payment_id, attempt",
)
"""What the index needs of payments, attempts and captures."""


class Options(NamedTuple):
    """What to measure. store, db: as of ``bench notify``. payments: in the database, half of them paid."""

    store: str
    folder: Path
    db: str | None = None
    payments: int = 1_000_000
    rounds: int = 3


class Rates(NamedTuple):
    """Payments a second in each round, the best of which counts: a start has nothing to wait for but the machine."""

    warm: list[float]
    scan: list[float]


def main(options: Options, progress: Progress) -> Result:
    """Prepare, measure, and return the figures. Raises BenchError where not every payment was read."""
    half = options.payments // 2
    start_ms = now_ms() - AGE_MS - options.payments // 50
    paid = Lot(start_ms, half, 1, paid=True)
    lots = [paid, Lot(paid.end_ms, options.payments - half, 2)]
    with opened(options.store, options.db, options.folder) as database:
        progress.phase("write payments", options.payments)
        for lot in lots:
            if lot.size:
                database.write(lot, progress.done)
        database.settle()
        rates = measure(database, options, progress)
        baseline_rate = one_by_one(database, lots[-1], progress)
        starts_ns = start_servers(database, options, progress)
        facts = {**database.facts(), "payments": f"{options.payments:,}, half of them paid"}
    rate, limit_rate = max(rates.warm), max(rates.scan)
    scan = f"the same columns in order, {ROWS_A_STEP:,} rows at a time, dropped as they come: the limit"
    reads = f"records of {RECORDS_A_READ} payments a read, put one by one: the baseline"
    p50_ms, p99_ms = (percentile_ms(sorted(starts_ns), share) for share in (0.5, 0.99))
    rows = [
        Row("record by record", reads, baseline_rate),
        Row("warm start", "columns, many payments a read, into the index", rate),
        Row("paycore serve", "from its start until calls are taken", options.payments / p50_ms * 1e3, p50_ms, p99_ms),
        Row("bare scan", scan, limit_rate),
    ]
    rows = [row._replace(of_limit=row.rate / limit_rate if row.rate else None) for row in rows]
    return Result(
        benchmark="startup",
        unit="payments",
        rate=rate,
        baseline_rate=baseline_rate,
        limit_rate=limit_rate,
        p50_ms=p50_ms,
        p99_ms=p99_ms,
        size=options.payments,
        rows=rows,
        facts=facts | {"rounds": f"the best of {options.rounds} interleaved ones"},
        more={"store": options.store},
    )


def measure(database: Database, options: Options, progress: Progress) -> Rates:
    """Warm an index and scan, in turn."""
    rates = Rates([], [])
    progress.phase("warm start and bare scan", options.rounds)
    for number in range(options.rounds):
        index, store = Index(), open_store(database.url)
        try:
            started_ns = time.perf_counter_ns()
            loaded = warm(store, index, CODES, options.payments)
            rates.warm.append(options.payments / (time.perf_counter_ns() - started_ns) * 1e9)
        finally:
            store.dispose()
        expect("payments in the index", len(index), options.payments)
        expect("payments that were loaded", loaded, options.payments)
        started_ns = time.perf_counter_ns()
        scanned = [database.scan(query) for query in SCANS]
        rates.scan.append(options.payments / (time.perf_counter_ns() - started_ns) * 1e9)
        expect("payments that were scanned", scanned[0], options.payments)
        progress.done(number + 1)
    return rates


def one_by_one(database: Database, lot: Lot, progress: Progress) -> float:
    """Read records and put each payment; return payments a second."""
    ids, index, store = list(lot.ids())[:MAX_BASELINE], Index(), open_store(database.url)
    progress.phase("record by record", len(ids))
    try:
        writer_no = store.open_writer(now_ms())
        started_ns = time.perf_counter_ns()
        with store.write(Stamp(now_ms(), writer_no, 1)) as transaction:
            for start in range(0, len(ids), RECORDS_A_READ):
                for record in transaction.load_records(ids[start : start + RECORDS_A_READ]).values():
                    payment, attempts = record.payment, sorted(record.attempts.items())
                    index.put(
                        payment.payment_id,
                        payment.amount_minor,
                        CURRENCY_CODES[payment.currency],
                        payment.expire_at_ms,
                        record.state,
                        0,
                        len(attempts),
                        record.captured_mask(),
                        tuple(CODES[row.channel, row.account] for _, row in attempts),
                    )
                progress.done(start)
        seconds = (time.perf_counter_ns() - started_ns) / 1e9
    finally:
        store.dispose()
    expect("payments that were put one by one", len(index), len(ids))
    return len(ids) / seconds


def start_servers(database: Database, options: Options, progress: Progress) -> list[int]:
    """Start `paycore serve` some times; return how long it took each time until calls were taken, in ns."""
    starts_ns = []
    progress.phase("paycore serve", options.rounds)
    for number in range(options.rounds):
        started_ns = time.perf_counter_ns()
        flags = ("--warm-payments", str(options.payments))
        with paycore_server(database.url, options.folder, None, flags) as server:
            starts_ns.append(time.perf_counter_ns() - started_ns)
            entries = server.metrics().get(("paycore_index_entries", ()), 0)
        expect("payments in the server's index", int(entries), options.payments)
        progress.done(number + 1)
    return starts_ns


def expect(what: str, found: int, wanted: int) -> None:
    """Raise CountError unless everything was there."""
    if found != wanted:
        raise CountError(f"{what}: {found}, not {wanted}")
