"""The limit: the rows of the accepted path into the same table, with as many in a commit, alone in a process.

No gRPC, no decision, no index. The rows lie in memory as the driver wants them before timing starts, and the statement
is the fastest that this database is known to have. On SQLite that is found out: the store's own statements are tried,
and shorter ones, and the faster count. ``python -m paycore.bench.bare_store JSON`` prints {"seconds": ...}.
"""

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from typing import Any, NamedTuple

from paycore.bench.bare_rows import COLUMNS, OF_ROW, groups, outcomes
from paycore.bench.payments import Lot
from paycore.bench.processes import pinned_to
from paycore.bench.result import BenchError, CountError
from paycore.domain.verdicts import CaptureSource, PaymentState
from paycore.store.rows import OutcomeRow
from paycore.store.sqlite import _ROWS_A_STATEMENT

SHAPES: tuple[tuple[int, ...], ...] = (_ROWS_A_STATEMENT, (50, 1))
"""Rows a statement on SQLite, as many as there are left for: the store's own, and a shape that may be faster."""

_SECONDS = 600

Commit = Callable[[], int]
"""Write one group durably; return how many rows went in."""


def measure(url: str, lot: Lot, group: int, core: int | None = None) -> float:
    """Rows a second, in a process that does nothing else. Raises BenchError unless every row goes in.

    SQLite takes the rows of as many lots as there are ``SHAPES``, this one and those after it: the best rate counts.
    """
    if not url.startswith("sqlite"):
        return _measure(url, lot, group, core, ())
    rates = []
    for shape in SHAPES:
        rates.append(_measure(url, lot, group, core, shape))
        lot = lot._replace(first_ms=lot.end_ms)
    return max(rates)


def _measure(url: str, lot: Lot, group: int, core: int | None, shape: tuple[int, ...]) -> float:
    command = [sys.executable, "-m", "paycore.bench.bare_store", json.dumps([url, lot, group, shape])]
    with pinned_to(core):
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)
    if ended.returncode != 0:
        raise BenchError(f"the bare store failed: {ended.stderr[-2000:]}")
    return float(lot.size / json.loads(ended.stdout)["seconds"])


class _Run(NamedTuple):
    """A statement and the values of each time that it is executed."""

    statement: str
    values: list[tuple[Any, ...]]


@cache
def _sqlite_statement(rows: int) -> str:
    def values(first: int) -> str:
        key, attempt, trade, amount, currency, paid, received, untrusted = (f"?{first + place}" for place in range(8))
        return (
            f"({key}, {PaymentState.PAID:d}, {attempt}, {trade}, {amount}, {currency}, {paid}, {received},"
            f" {CaptureSource.NOTIFICATION:d}, {untrusted}, 0, ?1, ?2, ?3)"
        )

    every = ", ".join(values(4 + 8 * row) for row in range(rows))
    return f"INSERT INTO payment_outcome ({COLUMNS}) VALUES {every} ON CONFLICT (payment_id) DO NOTHING"  # noqa: S608


def _sqlite_runs(group: list[OutcomeRow], shape: tuple[int, ...]) -> list[_Run]:
    """What a group is inserted by: statements of the most rows first, the rest by shorter ones."""
    shared, start, runs = group[0][-3:], 0, []
    for rows in shape:
        end = len(group) - (len(group) - start) % rows
        values = [
            (*shared, *(row[place] for row in group[first : first + rows] for place in OF_ROW))
            for first in range(start, end, rows)
        ]
        if values:
            runs.append(_Run(_sqlite_statement(rows), values))
        start = end
    return runs


def run_sqlite(path: str, lot: Lot, size: int, shape: tuple[int, ...]) -> float:
    """Insert into a SQLite file by statements of this shape; return the seconds that it took."""
    every = [_sqlite_runs(group, shape) for group in groups(list(outcomes(lot)), size)]
    inserted = 0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            raise BenchError(f"{path} is not in WAL mode")
        started_ns = time.perf_counter_ns()
        for group in every:
            connection.execute("BEGIN IMMEDIATE")
            for run in group:
                inserted += connection.executemany(run.statement, run.values).rowcount
            connection.execute("COMMIT")
        seconds = (time.perf_counter_ns() - started_ns) / 1e9
    if inserted != lot.size:
        raise CountError(f"{inserted} of {lot.size} outcomes went into {path}")
    return seconds


def _main(asked: str) -> None:
    url, lot, group, shape = json.loads(asked)
    payments = Lot(*lot[:-1])
    if url.startswith("sqlite"):
        seconds = run_sqlite(url.removeprefix("sqlite:///"), payments, group, tuple(shape))
    else:
        # Imported where it is needed: SQLite is measured without the driver.
        from paycore.bench.postgresql import run_bare

        seconds = run_bare(url, payments, group)
    print(json.dumps({"seconds": seconds}))  # noqa: T201 - the parent reads it


if __name__ == "__main__":
    _main(sys.argv[1])
