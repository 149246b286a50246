"""The databases that are measured on: a new SQLite file, or a PostgreSQL database that is empty."""

import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from paycore.bench import machine
from paycore.bench.payments import ROWS_A_STEP, Lot, id_sql, statements
from paycore.bench.result import BenchError
from paycore.store.rows import Stamp
from paycore.store.schema import migrate

COUNTED = ("payment_outcome", "quarantine", "excess_payment", "refund")
"""The tables that a notification may add to."""

_SQLITE_SOURCE = (
    "WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})"
    " SELECT i, {id} AS payment_id FROM n"
)


class Database(Protocol):
    """A database with this version's schema and nothing in it yet."""

    url: str

    def write(self, lot: Lot, done: Callable[[int], None]) -> None:
        """Write a lot of payments; ``done`` is told how many are written."""
        ...

    def settle(self) -> None:
        """Leave nothing of what was written to be done while figures are taken."""
        ...

    def counts(self) -> dict[str, int]:
        """How many rows each of ``COUNTED`` holds."""
        ...

    def scan(self, query: str) -> int:
        """Read every row of a query through the driver, some at a time; return how many there were."""
        ...

    def facts(self) -> Mapping[str, str]:
        """What it is and how durable its commits are."""
        ...


class SqliteDatabase:
    """A file that this makes; see ``Database``. Raises BenchError where there is one."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise BenchError(
                f"{path}: is there already; name a file that is not, for payments that nobody made go into it"
            )
        self.path = path
        self.url = f"sqlite:///{path}"
        migrate(self.url)

    def write(self, lot: Lot, done: Callable[[int], None]) -> None:
        """See ``Database``. Not made durable at each step: ``settle`` does that."""
        stamp = Stamp(lot.first_ms, lot.node, 1)
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA synchronous = OFF")
            for first, end in steps(lot.size):
                source = _SQLITE_SOURCE.format(first=first, last=end - 1, id=id_sql(lot))
                connection.execute("BEGIN IMMEDIATE")
                for statement in statements(lot, source, stamp):
                    connection.execute(statement)
                connection.execute("COMMIT")
                done(end)

    def settle(self) -> None:
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.sync()

    def counts(self) -> dict[str, int]:
        with closing(self._connect()) as connection:
            return {table: int(connection.execute(count_sql(table)).fetchone()[0]) for table in COUNTED}

    def scan(self, query: str) -> int:
        with closing(self._connect()) as connection:
            return count_rows(connection.execute(query).fetchmany)

    def facts(self) -> Mapping[str, str]:
        return {
            "database": f"SQLite {sqlite3.sqlite_version}, WAL, synchronous=FULL",
            "fsync": f"{machine.fsync_ms(self.path.parent):.2f} ms for 4 KiB",
        }

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, isolation_level=None, timeout=60)


def steps(count: int) -> Iterator[tuple[int, int]]:
    """The places of a lot in parts: the first, and the one after the last."""
    for first in range(0, count, ROWS_A_STEP):
        yield first, min(first + ROWS_A_STEP, count)


def count_rows(fetch: Callable[[int], Sequence[object]]) -> int:
    """Fetch rows, many at a time, until there are none."""
    count = 0
    while rows := fetch(ROWS_A_STEP):
        count += len(rows)
    return count


def count_sql(table: str) -> str:
    """The query for a table's number of rows."""
    return f"SELECT count(*) FROM {table}"  # noqa: S608 - a name of ours


def now_ms() -> int:
    """The time, as the server tells it."""
    return time.time_ns() // 1_000_000


@contextmanager
def opened(store: str, url: str | None, folder: Path) -> Iterator[Database]:
    """Make a database for a measurement, or take the one that ``url`` names, which must be new or empty."""
    kind = url.partition(":")[0].partition("+")[0] if url else store
    if kind == "sqlite":
        yield SqliteDatabase(Path(url.removeprefix("sqlite:///")) if url else folder / "paycore.db")
        return
    if kind == "postgresql":
        # Imported where it is needed: SQLite is measured without the driver.
        from paycore.bench import postgresql, postgresql_server

        with nullcontext(url) if url else postgresql_server.running(folder) as server_url:
            yield postgresql.PostgresqlDatabase(server_url)
        return
    raise BenchError(f"{kind}: not supported; give --store sqlite or --store postgresql, or the URL of one")
