"""What all peers share: options, payments to be paid, threads that pay them, and how a result is told."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.pool import QueuePool

from benchmarks import machine
from paycore.bench.databases import Database, now_ms, opened
from paycore.bench.payments import CURRENCY, Lot, amount_minor, trade_no
from paycore.bench.result import BenchError, CountError, percentile_ms

AGE_MS = 60_000
MANY = 50_000


class SkippedError(Exception):
    """The peer cannot run here; the message says what is missing."""


class Options(NamedTuple):
    """How a peer is measured. size: notifications. batch: of what is sent at once, where the peer knows batches."""

    store: str
    size: int
    threads: int
    batch: int
    folder: Path


class Result(NamedTuple):
    """What came of a peer. size: notifications. A latency is of one, or of one batch where the peer knows batches."""

    peer: str
    meaning: str
    rate: float
    p50_ms: float
    p99_ms: float
    size: int
    facts: Mapping[str, str]


class Success(NamedTuple):
    """A channel's word that a payment was made."""

    payment_id: int
    amount_minor: int
    currency: str
    channel_trade_no: str
    paid_at_ms: int


class Timed(NamedTuple):
    """How long it took, and how long each piece of it, sorted."""

    seconds: float
    latencies_ns: list[int]

    def result(self, peer: str, meaning: str, size: int, facts: Mapping[str, str]) -> Result:
        """Make a result of it."""
        p50_ms, p99_ms = (percentile_ms(self.latencies_ns, share) for share in (0.5, 0.99))
        return Result(peer, meaning, size / self.seconds, p50_ms, p99_ms, size, facts)


def lot(count: int) -> Lot:
    """Payments as a server makes them, the last of them a minute ago."""
    first_ms = now_ms() - AGE_MS - count // 50
    return Lot(first_ms, count, 1)


def successes(payments: Lot) -> list[Success]:
    """One success for each payment, in the order of their making."""
    at_ms = payments.end_ms + 1_000
    return [
        Success(payment_id, amount_minor(payment_id), CURRENCY, trade_no(payment_id, 1), at_ms)
        for payment_id in payments.ids()
    ]


def pay(threads: int, words: Sequence[Success], handle: Callable[[Success], None]) -> Timed:
    """Let threads handle words, each the next that is left; an error of one ends it. Nothing else runs meanwhile."""
    left, latencies_ns, errors = iter(words), [[] for _ in range(threads)], []  # type: ignore[var-annotated]

    def run(own_ns: list[int]) -> None:
        try:
            for word in left:
                started_ns = time.perf_counter_ns()
                handle(word)
                own_ns.append(time.perf_counter_ns() - started_ns)
        except Exception as error:
            errors.append(error)
            raise

    workers = [threading.Thread(target=run, args=(own_ns,)) for own_ns in latencies_ns]
    started_ns = time.perf_counter_ns()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = (time.perf_counter_ns() - started_ns) / 1e9
    if errors:
        raise BenchError(f"{len(errors)} of {threads} threads failed: {errors[0]}")
    return Timed(seconds, sorted(latency_ns for own_ns in latencies_ns for latency_ns in own_ns))


@contextmanager
def engine_on(database: Database, threads: int) -> Iterator[Engine]:
    """A pooled engine on a database, with a connection for each thread; its commits are durable."""
    url = database.url.replace("postgresql://", "postgresql+psycopg://", 1)
    arguments = {"timeout": 60, "isolation_level": None} if url.startswith("sqlite") else {}
    engine = create_engine(url, poolclass=QueuePool, pool_size=threads, max_overflow=0, connect_args=arguments)
    if url.startswith("sqlite"):

        @event.listens_for(engine, "connect")
        def _durable(connection: object, record: object) -> None:
            del record
            connection.execute("PRAGMA synchronous = FULL")  # type: ignore[attr-defined]

        @event.listens_for(engine, "begin")
        def _begin(connection: object) -> None:
            # The one lock that SQLite has, taken before anything is read: the row lock of a database without any.
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # type: ignore[attr-defined]

    try:
        yield engine
    finally:
        engine.dispose()


def expect(what: str, found: int, wanted: int) -> None:
    """Raise CountError unless everything was done once."""
    if found != wanted:
        raise CountError(f"{what}: {found}, not {wanted}")


Measure = Callable[[Options, Database], Result]


def main(measure: Measure, *, batch: int = 1, store: str = "postgresql") -> int:
    """Run a peer with the options of the command line and print what came of it. 0: done or skipped."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default=store)
    parser.add_argument("--count", type=int, default=20_000, help="notifications (default 20,000)")
    # More than one only stand in each other's way where the database takes one writer at a time.
    parser.add_argument("--threads", type=int, help="that call at the same time (default: 8, on SQLite 1)")
    parser.add_argument("--batch", type=int, default=batch, help="of what is sent at once, where it knows batches")
    parser.add_argument("--folder", type=Path, help="where files are made: a local disk (default: TMPDIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="paycore-peer-", dir=asked.folder) as folder:
            threads = asked.threads or (1 if asked.store == "sqlite" else 8)
            options = Options(asked.store, asked.count, threads, asked.batch, Path(folder))
            with opened(options.store, None, options.folder) as database:
                result = measure(options, database)
    except SkippedError as reason:
        print(json.dumps({"skipped": str(reason)}) if asked.json else f"SKIPPED: {reason}")
        return 0
    except BenchError as error:
        print(f"no figures: {error}", file=sys.stderr)
        return 1
    if asked.json:
        print(json.dumps(result._asdict() | {"count": result.size, "machine": machine.describe()}))
        return 0
    for name, value in (machine.describe() | dict(result.facts)).items():
        print(f"{name:>12}  {value}")
    print(f"{result.peer}: {result.rate:,.0f}/s, p50 {result.p50_ms:.2f} ms, p99 {result.p99_ms:.2f} ms")
    print(f"{result.size:,} times: {result.meaning}.")
    return 0
