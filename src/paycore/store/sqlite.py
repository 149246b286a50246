"""The store on SQLite: one writer connection whose transactions begin IMMEDIATE, readers beside it.

BEGIN IMMEDIATE takes SQLite's one write lock at the start, so whatever a write transaction reads stays true until it
ends: between processes, too. That lock takes the place of the row locks that another database needs.
"""

import bisect
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, RootTransaction, insert
from sqlalchemy.dialects import sqlite as dialect
from sqlalchemy.exc import DBAPIError

from paycore.domain.errors import StoreUnavailableError
from paycore.domain.verdicts import CaptureSource, PaymentState
from paycore.failpoint import FailpointError, failpoint
from paycore.store import tables
from paycore.store.engine import DatabaseRefusedError, SqliteFile
from paycore.store.protocol import CommitUnknownError, FirstOutcomes, RowRefusedError, StoreBusyError
from paycore.store.reading import SqlReads
from paycore.store.rows import PaymentRecord, Stamp
from paycore.store.statements import Inserts, SqlTransaction

_Read = TypeVar("_Read")

_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_PRIMARY_CODE_MASK = 0xFF

_VALUES_A_ROW = 8
"""What ``FirstOutcomes.values`` says of each."""

_ROWS_A_STATEMENT = (500, 100, 20, 5, 1)
"""Rows in one insert, as many as there are left for. A statement of many costs less a row than many statements, and
each statement gives up the interpreter once and has to get it back from the other threads.
"""

_ROW_ERRORS = (sqlite3.IntegrityError, sqlite3.DataError)


def _first_outcomes_sql(count: int) -> str:
    """The statement of the accepted path for so many rows: three parameters that all share, then eight a row."""
    names = ", ".join(column.name for column in tables.payment_outcome.columns)
    rows = ", ".join(_first_outcome_values(4 + 8 * row) for row in range(count))
    return f"INSERT INTO payment_outcome ({names}) VALUES {rows} ON CONFLICT (payment_id) DO NOTHING"  # noqa: S608 - no input


def _first_outcome_values(first: int) -> str:
    payment_id, attempt, trade_no, amount, currency, paid_at, received_at, untrusted = range(first, first + 8)
    return (
        f"(?{payment_id}, {PaymentState.PAID:d}, ?{attempt}, ?{trade_no}, ?{amount}, ?{currency}, ?{paid_at},"
        f" ?{received_at}, {CaptureSource.NOTIFICATION:d}, ?{untrusted}, 0, ?1, ?2, ?3)"
    )


_INSERTS = Inserts(dialect.insert, dialect.dialect(paramstyle="qmark"))
_INSERT_FIRST_OUTCOMES = {rows: _first_outcomes_sql(rows) for rows in _ROWS_A_STATEMENT}


def _values_without(outcomes: FirstOutcomes, payment_ids: Sequence[int], excluded: set[int]) -> list[Any]:
    """The values of all rows but those of the excluded payments. payment_ids: of all rows, in their order."""
    values: list[Any] = []
    start = 0
    for row in sorted(bisect.bisect_left(payment_ids, payment_id) for payment_id in excluded):
        values += outcomes.values(start, row)
        start = row + 1
    return values + outcomes.values(start, len(payment_ids)) if values else outcomes.values(start, len(payment_ids))


class SqliteTransaction(SqlTransaction):
    """One write transaction, which holds the whole database from its start."""

    def __init__(self, connection: Connection, stamp: Stamp) -> None:
        super().__init__(connection, stamp, _INSERTS, dialect.insert)

    def lock_records(self, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
        return self.load_records(payment_ids)

    def hold_open(self, payment_ids: Sequence[int]) -> set[int]:
        """Nobody else writes: what ``load_records`` said is so."""
        return set()

    def insert_first_outcomes(self, outcomes: FirstOutcomes) -> set[int]:
        ids = outcomes.payment_ids
        excluded = self._with_excess(ids)
        values = _values_without(outcomes, ids, excluded)
        count = len(ids) - len(excluded)
        inserted = start = 0
        for rows in _ROWS_A_STATEMENT:
            stop = count - (count - start) % rows
            inserted += self._insert_rows(_INSERT_FIRST_OUTCOMES[rows], values, start, stop, rows)
            start = stop
        if inserted == count:
            return excluded
        return excluded | self._lost_outcomes([payment_id for payment_id in ids if payment_id not in excluded])

    def _insert_rows(self, statement: str, values: list[Any], start: int, stop: int, rows: int) -> int:
        """Insert the rows from start to stop, so many a statement; return how many went in."""
        shared = self._shared
        parameters = [
            (*shared, *values[row * _VALUES_A_ROW : (row + rows) * _VALUES_A_ROW]) for row in range(start, stop, rows)
        ]
        return self._insert_driver(statement, parameters) if parameters else 0

    @property
    def _shared(self) -> tuple[int, int, int]:
        return (self.stamp.recorded_at_ms, self.stamp.writer_no, self.stamp.group_no)

    def _insert_driver(self, statement: str, values: Any) -> int:
        return self._connection.exec_driver_sql(statement, values).rowcount


class SqliteStore(SqlReads):
    """A SQLite file; see ``store.protocol.Store``. ``write`` belongs to one thread, the reads to any."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._writing: Engine = file.engine(writes=True)
        self._reading: Engine = file.engine(writes=False)
        self._connection: Connection | None = None
        self._opened: tuple[int, int] | None = None

    def open_writer(self, started_at_ms: int) -> int:
        with self._translated(), self._writer_connection().begin():
            result = self._writer_connection().execute(
                insert(tables.writer).values(started_at_ms=started_at_ms, seen_at_ms=started_at_ms)
            )
            key = result.inserted_primary_key
        assert key is not None, "SQLite numbers the rows of this table"
        return int(key[0])

    @contextmanager
    def write(self, stamp: Stamp) -> Iterator[SqliteTransaction]:
        try:
            with self._translated():
                connection = self._writer_connection()
                with connection.begin() as transaction:
                    failpoint("store.begun")
                    yield SqliteTransaction(connection, stamp)
                    failpoint("store.before_commit")
                    self._refuse_replaced_file()
                    self._commit(transaction)
        except StoreUnavailableError:
            # The file may be another one when it comes back, so the next group opens it anew.
            self._drop_connection()
            raise

    def _commit(self, transaction: RootTransaction) -> None:
        try:
            transaction.commit()
            failpoint("store.committed")
        except (DBAPIError, FailpointError) as error:
            failure = self._translate(error.orig) if isinstance(error, DBAPIError) else error
            if isinstance(failure, StoreUnavailableError):
                raise failure from error
            raise CommitUnknownError(str(error)) from error

    def dispose(self) -> None:
        self._drop_connection()
        self._writing.dispose()
        self._reading.dispose()

    def read(self, look: Callable[[Connection], _Read]) -> _Read:
        try:
            with self._translated(), self._reading.connect() as connection, connection.begin():
                return look(connection)
        except StoreBusyError as error:
            # Only writes are run again; a reader's caller is told that a retry can help.
            raise StoreUnavailableError("STORE_BUSY", "another process holds the database") from error

    def _writer_connection(self) -> Connection:
        if self._connection is None:
            self._opened = self._file.identity()
            self._connection = self._writing.connect()
            # Readers may still hold the file that was there before.
            self._reading.dispose()
        return self._connection

    def _refuse_replaced_file(self) -> None:
        """SQLite goes on writing to a file that was deleted or moved away, and what it commits there is lost."""
        if self._file.identity() != self._opened:
            raise StoreUnavailableError(
                "STORE_UNAVAILABLE", f"{self._file.path}: the database file was deleted or replaced while in use"
            )

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into those of ``store.protocol``."""
        try:
            yield
        except DBAPIError as error:
            raise self._translate(error.orig) from error
        except sqlite3.Error as error:
            raise self._translate(error) from error
        except DatabaseRefusedError as error:
            raise StoreUnavailableError("STORE_UNAVAILABLE", str(error)) from error
        except FailpointError as error:
            raise StoreBusyError(f"failpoint {error}") from error

    def _translate(self, error: BaseException | None) -> Exception:
        if isinstance(error, _ROW_ERRORS):
            return RowRefusedError(str(error))
        code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE_MASK
        if code in _BUSY_CODES:
            return StoreBusyError(str(error))
        return StoreUnavailableError("STORE_UNAVAILABLE", f"the database cannot be used: {error}")
