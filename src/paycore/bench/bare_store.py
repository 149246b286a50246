"""The limit: the rows of the accepted path into the same table, with as many in a commit, alone in a process.

No gRPC, no decision, no index. The rows lie in memory as the driver wants them before timing starts, and the statement
is the fastest that this database is known to have. ``python -m paycore.bench.bare_store JSON`` prints {"seconds": ...}.
"""

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

from paycore.bench.bare_rows import COLUMNS, OF_ROW, groups, outcomes
from paycore.bench.payments import Lot
from paycore.bench.processes import pinned_to
from paycore.bench.result import BenchError, CountError
from paycore.domain.verdicts import CaptureSource, PaymentState
from paycore.store.rows import OutcomeRow

_ROWS_A_STATEMENT = 50
_SECONDS = 600

Commit = Callable[[], int]
"""Write one group durably; return how many rows went in."""


def measure(url: str, lot: Lot, group: int, core: int | None = None) -> float:
    """Rows a second, in a process that does nothing else. Raises BenchError unless every row goes in."""
    command = [sys.executable, "-m", "paycore.bench.bare_store", json.dumps([url, lot, group])]
    with pinned_to(core):
        ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_SECONDS)
    if ended.returncode != 0:
        raise BenchError(f"the bare store failed: {ended.stderr[-2000:]}")
    return float(lot.size / json.loads(ended.stdout)["seconds"])


class _SqliteValues(NamedTuple):
    """A group as its statements take it: whole ones of ``_ROWS_A_STATEMENT``, and what is left, row by row."""

    whole: list[tuple[Any, ...]]
    rest: list[tuple[Any, ...]]


def _sqlite_statement(rows: int) -> str:
    def values(first: int) -> str:
        key, attempt, trade, amount, currency, paid, received, untrusted = (f"?{first + place}" for place in range(8))
        return (
            f"({key}, {PaymentState.PAID:d}, {attempt}, {trade}, {amount}, {currency}, {paid}, {received},"
            f" {CaptureSource.NOTIFICATION:d}, {untrusted}, 0, ?1, ?2, ?3)"
        )

    every = ", ".join(values(4 + 8 * row) for row in range(rows))
    return f"INSERT INTO payment_outcome ({COLUMNS}) VALUES {every} ON CONFLICT (payment_id) DO NOTHING"  # noqa: S608


def _sqlite_values(group: list[OutcomeRow]) -> _SqliteValues:
    shared = group[0][-3:]

    def joined(rows: list[OutcomeRow]) -> tuple[Any, ...]:
        return (*shared, *(row[place] for row in rows for place in OF_ROW))

    end = len(group) - len(group) % _ROWS_A_STATEMENT
    whole = [joined(group[start : start + _ROWS_A_STATEMENT]) for start in range(0, end, _ROWS_A_STATEMENT)]
    return _SqliteValues(whole, [joined([row]) for row in group[end:]])


def run_sqlite(path: str, lot: Lot, size: int) -> float:
    """Insert into a SQLite file; return the seconds that it took."""
    every = [_sqlite_values(group) for group in groups(list(outcomes(lot)), size)]
    many, one = _sqlite_statement(_ROWS_A_STATEMENT), _sqlite_statement(1)
    inserted = 0
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = FULL")
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            raise BenchError(f"{path} is not in WAL mode")
        started_ns = time.perf_counter_ns()
        for group in every:
            connection.execute("BEGIN IMMEDIATE")
            for values in group.whole:
                inserted += connection.execute(many, values).rowcount
            inserted += connection.executemany(one, group.rest).rowcount if group.rest else 0
            connection.execute("COMMIT")
        seconds = (time.perf_counter_ns() - started_ns) / 1e9
    if inserted != lot.size:
        raise CountError(f"{inserted} of {lot.size} outcomes went into {path}")
    return seconds


def _main(asked: str) -> None:
    url, lot, group = json.loads(asked)
    payments = Lot(*lot[:-1])
    if url.startswith("sqlite"):
        seconds = run_sqlite(url.removeprefix("sqlite:///"), payments, group)
    else:
        # Imported where it is needed: SQLite is measured without the driver.
        from paycore.bench.postgresql import run_bare

        seconds = run_bare(url, payments, group)
    print(json.dumps({"seconds": seconds}))  # noqa: T201 - the parent reads it


if __name__ == "__main__":
    _main(sys.argv[1])
