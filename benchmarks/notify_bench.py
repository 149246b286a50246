"""Durable unary Notify beside an empty handler: calls a second, CPU time a call, p50 and p99.

`paycore serve` on a fresh SQLite file, synchronous=FULL, and a grpc.aio server whose handler does nothing, each a
process on one core; the same load on another core. Before each case the empty handler is measured, and the ratio is
taken to that. What the calls became is read from the server's metrics and from the database; if the counts are
not what was sent, there is no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.notify_cases import Bodies, Case, Prepared, prepare
from benchmarks.notify_load import IN_FLIGHT, Load, LoadError, choose_load
from paycore.bench.empty_server import ANSWER, METHOD
from paycore.bench.processes import (
    Cores,
    ProcessError,
    Server,
    choose_cores,
    empty_server,
    paycore_server,
    pinned_to,
)
from paycore.domain.verdicts import NotifyOutcome

EMPTY = "empty handler"
EMPTY_MEANING = "grpc.aio, bytes in and always the same bytes out: the baseline"
BARE = "bare store"
BARE_MEANING = "the first notifications' rows into the same table, as many in a commit, alone in a process: the limit"
FULL = "bare store, full groups"
FULL_MEANING = f"the same with {IN_FLIGHT} in a commit, which is all that ever waits at once"
COUNTED_TABLES = ("payment_outcome", "quarantine", "excess_payment", "refund")
WARM_UP = 2_000
FSYNCS = 50


class CountError(Exception):
    """The server did other than it was asked: its figures say nothing."""


class Sample(NamedTuple):
    """One measurement. cpu_us: the server's CPU time a call; group: writes in a commit; None: not known."""

    rate: float
    baseline_rate: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    cpu_us: float | None = None
    group: float | None = None


class Row(NamedTuple):
    """One row of the result: medians over the runs. ratio: to the empty handler measured just before."""

    name: str
    meaning: str
    rate: float
    slowest_rate: float
    fastest_rate: float
    ratio: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_us: float | None
    group: float | None


class Bench:
    """The measurements so far, and what is needed to take the next ones."""

    def __init__(self, prepared: Prepared, folder: Path, load: Load, cores: Cores, empty: Server, workers: int) -> None:
        self._prepared = prepared
        self._folder = folder
        self._load = load
        self._cores = cores
        self._empty = empty
        self._flags = ["--workers", str(workers)] if workers > 1 else []
        self.samples: dict[str, list[Sample]] = {}
        self.meanings = {EMPTY: EMPTY_MEANING, BARE: BARE_MEANING, FULL: FULL_MEANING}

    def run_once(self) -> None:
        """Measure every case once, on a fresh copy of the prepared database."""
        database = self._copy_database()
        with paycore_server(f"sqlite:///{database}", self._folder, self._cores.server, self._flags) as server:
            self._make_known(server, database)
            for case in self._prepared.cases:
                baseline_rate = self._measure_empty(case.bodies)
                self._measure(case, server, database, baseline_rate)
        reached = self.samples[self._prepared.cases[0].name][-1]
        assert reached.group is not None, "the server tells how many commits it made"
        self._measure_bare_store(BARE, max(1, round(reached.group)), reached.baseline_rate)
        self._measure_bare_store(FULL, IN_FLIGHT, reached.baseline_rate)

    def _copy_database(self) -> Path:
        database = self._folder / "paycore.db"
        for suffix in ("", "-wal", "-shm"):
            database.with_name(database.name + suffix).unlink(missing_ok=True)
        shutil.copy(self._prepared.database, database)
        # So that nothing of the copy is left to be written while figures are taken.
        os.sync()
        return database

    def _make_known(self, server: Server, database: Path) -> None:
        bodies = self._prepared.making_known
        case = Case("", "", bodies, NotifyOutcome.RECORDED, replayed=True, table=None)
        before = Counted.now(server, database)
        self._load.run(server.address, METHOD, bodies)
        Counted.now(server, database).check(before, case)

    def _measure_empty(self, bodies: Bodies) -> float:
        cpu_before = self._empty.cpu_seconds()
        loaded = self._load.run(self._empty.address, METHOD, bodies)
        if loaded.answer_bytes != bodies.messages * len(ANSWER):
            raise CountError(f"{EMPTY}: {loaded.answer_bytes} bytes came, not {len(ANSWER)} for each call")
        sample = Sample(
            loaded.rate,
            loaded.rate,
            loaded.latency_ms(0.5),
            loaded.latency_ms(0.99),
            cpu_us_a_call(cpu_before, self._empty.cpu_seconds(), bodies.messages),
        )
        self.samples.setdefault(EMPTY, []).append(sample)
        return loaded.rate

    def _measure(self, case: Case, server: Server, database: Path, baseline_rate: float) -> None:
        before = Counted.now(server, database)
        loaded = self._load.run(server.address, METHOD, case.bodies)
        after = Counted.now(server, database)
        after.check(before, case)
        sample = Sample(
            loaded.rate,
            baseline_rate,
            loaded.latency_ms(0.5),
            loaded.latency_ms(0.99),
            cpu_us_a_call(before.cpu_seconds, after.cpu_seconds, case.bodies.messages),
            case.bodies.messages / (after.commits - before.commits),
        )
        self.samples.setdefault(case.name, []).append(sample)
        self.meanings[case.name] = case.meaning

    def _measure_bare_store(self, name: str, group: int, baseline_rate: float) -> None:
        count = self._prepared.cases[0].bodies.messages
        command = [sys.executable, "-m", "benchmarks.bare_store", str(self._copy_database()), str(count), str(group)]
        with pinned_to(self._cores.server):
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rate = count / json.loads(ended.stdout)["seconds"]
        self.samples.setdefault(name, []).append(Sample(rate, baseline_rate, group=group))

    def rows(self) -> list[Row]:
        """The medians: the baseline first, the limit last."""
        names = [EMPTY, *(case.name for case in self._prepared.cases), FULL, BARE]
        return [make_row(name, self.meanings[name], self.samples[name]) for name in names]


class Counted(NamedTuple):
    """What a server says it has done, and what its database holds."""

    notifications: dict[tuple[str, str], float]
    commits: float
    cpu_seconds: float | None
    rows: dict[str, int]

    @classmethod
    def now(cls, server: Server, database: Path) -> Counted:
        """Ask."""
        cpu_seconds, samples = server.cpu_seconds(), server.metrics()
        notifications: dict[tuple[str, str], float] = {}
        for (name, labels), value in samples.items():
            if name == "paycore_notify_total":
                by = dict(labels)
                key = by["outcome"], by["replayed"]
                notifications[key] = notifications.get(key, 0) + value
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = {
                table: int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
                for table in COUNTED_TABLES
            }
        return cls(notifications, samples[("paycore_commit_group_size_count", ())], cpu_seconds, rows)

    def check(self, before: Counted, case: Case) -> None:
        """Raise CountError unless exactly what the case sends was done since ``before``."""
        done = {key: value - before.notifications.get(key, 0) for key, value in self.notifications.items()}
        done = {key: value for key, value in done.items() if value}
        expected = {(case.outcome.name, str(case.replayed).lower()): float(case.bodies.messages)}
        if done != expected:
            raise CountError(f"{case.name}: the server counted {done}, not {expected}")
        written = {table: count - before.rows[table] for table, count in self.rows.items()}
        wanted = {table: case.bodies.messages if table == case.table else 0 for table in COUNTED_TABLES}
        if written != wanted:
            raise CountError(f"{case.name}: the database got {written}, not {wanted}")


def cpu_us_a_call(before: float | None, after: float | None, calls: int) -> float | None:
    """A server's CPU time a call."""
    return None if before is None or after is None else (after - before) / calls * 1e6


def make_row(name: str, meaning: str, samples: Sequence[Sample]) -> Row:
    """Put the measurements of one row together."""
    rates = [sample.rate for sample in samples]
    return Row(
        name,
        meaning,
        statistics.median(rates),
        min(rates),
        max(rates),
        statistics.median(sample.rate / sample.baseline_rate for sample in samples),
        *(median_known(samples, key) for key in ("p50_ms", "p99_ms", "cpu_us", "group")),
    )


def median_known(samples: Sequence[Sample], key: str) -> float | None:
    """The median of what is known."""
    values = [value for sample in samples if (value := getattr(sample, key)) is not None]
    return statistics.median(values) if values else None


def fsync_ms(folder: Path) -> float:
    """What it costs this folder's disk to make 4 KiB durable: the median of some appends."""
    taken = []
    with (folder / "fsync").open("wb") as file:
        for _ in range(FSYNCS):
            file.write(bytes(4_096))
            file.flush()
            started_ns = time.perf_counter_ns()
            os.fsync(file.fileno())
            taken.append((time.perf_counter_ns() - started_ns) / 1e6)
    return statistics.median(taken)


# ---- Output ----------------------------------------------------------------------------------------------


def as_object(rows: Sequence[Row], about: dict[str, str], count: int, runs: int) -> dict[str, object]:
    """The result as one JSON object; the figures at its top are those of the first notifications."""
    empty, first, bare = rows[0], rows[1], rows[-1]
    return {
        "benchmark": "notify",
        "machine": about,
        "count": count,
        "runs": runs,
        "rate": first.rate,
        "baseline_rate": empty.rate,
        "limit_rate": bare.rate,
        "ratio": first.ratio,
        "p50_ms": first.p50_ms,
        "p99_ms": first.p99_ms,
        "results": [row._asdict() for row in rows],
    }


def show(console: Console, rows: Sequence[Row], about: dict[str, str], count: int, runs: int) -> None:
    """Print the result as a table, and what its rows measure."""
    for name, value in about.items():
        console.print(f"[dim]{name:>12}[/dim]  {value}", highlight=False)
    table = Table(title=f"Unary Notify, {count:,} calls a row and run, medians of {runs} interleaved runs")
    table.add_column("", no_wrap=True)
    for heading in ("calls/s", "range", "x empty", "p50 ms", "p99 ms", "CPU us/call", "group"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.rate:,.0f}",
            f"{row.slowest_rate:,.0f}-{row.fastest_rate:,.0f}",
            f"{row.ratio:.2f}",
            *("" if value is None else f"{value:.1f}" for value in (row.p50_ms, row.p99_ms, row.cpu_us, row.group)),
        )
    console.print(table)
    for row in rows:
        console.print(f"{row.name}: {row.meaning}.", highlight=False)
    console.print("x empty: to the empty handler measured just before, the median of the runs.", highlight=False)
    console.print("CPU us/call: of the server's process. group: writes in one commit.", highlight=False)


def at_least(low: int) -> Callable[[str], int]:
    """Make an argument's type: an integer of at least ``low``."""

    def integer(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value

    return integer


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks notify", description=__doc__)
    parser.add_argument("--count", type=at_least(1), default=10_000, help="calls a case and run (default 10,000)")
    parser.add_argument("--runs", type=at_least(1), default=5, help="runs of all cases, in turn (default 5)")
    parser.add_argument("--workers", type=at_least(1), default=1, help="of paycore serve; more than one: not pinned")
    parser.add_argument("--load", choices=("auto", "h2load", "grpc"), default="auto", help="what makes the load")
    parser.add_argument("--folder", type=Path, help="where the databases are made: a local disk (default: TMPDIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Prepare, run everything, and return the rows and what they were taken on."""
    cores = choose_cores() if options.workers == 1 else Cores(None, None)
    load = choose_load(options.load, folder, cores.load)
    about = machine.describe() | {
        "sqlite": sqlite3.sqlite_version,
        "fsync": f"{fsync_ms(folder):.2f} ms for 4 KiB",
        "load": load.description,
        "cores": cores.description,
        "workers": str(options.workers),
    }
    prepared = prepare(folder, options.count)
    with empty_server(folder, cores.server) as empty:
        warm_up = prepared.making_known._replace(messages=min(WARM_UP, options.count))
        load.run(empty.address, METHOD, warm_up)
        bench = Bench(prepared, folder, load, cores, empty, options.workers)
        for _ in range(options.runs):
            bench.run_once()
    return bench.rows(), about


def main(arguments: Sequence[str]) -> int:
    """Measure and print; ``--json`` prints one object instead of a table."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="paycore-bench-", dir=options.folder) as folder:
        try:
            rows, about = measure(options, Path(folder))
        except (CountError, LoadError, ProcessError) as error:
            print(f"no figures: {error}", file=sys.stderr)
            return 1
    if options.json:
        print(json.dumps(as_object(rows, about, options.count, options.runs)))
        return 0
    show(Console(width=None if sys.stdout.isatty() else 120), rows, about, options.count, options.runs)
    return 0
