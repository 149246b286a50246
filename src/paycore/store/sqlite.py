"""The store on SQLite: one writer connection whose transactions begin IMMEDIATE, readers beside it.

BEGIN IMMEDIATE takes SQLite's one write lock at the start, so whatever a write transaction reads stays true until it
ends: between processes, too. That lock takes the place of the row locks that another database needs.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import (
    Boolean,
    Connection,
    Engine,
    RootTransaction,
    Table,
    and_,
    bindparam,
    case,
    insert,
    literal_column,
    update,
)
from sqlalchemy.dialects import sqlite as dialect
from sqlalchemy.exc import DBAPIError

from paycore.domain.errors import StoreUnavailableError
from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState, CaptureSource, PaymentState
from paycore.failpoint import FailpointError, failpoint
from paycore.store import lookups, tables
from paycore.store.engine import DatabaseRefusedError, SqliteFile
from paycore.store.protocol import (
    Backlog,
    CaptureKey,
    CommitUnknownError,
    DueRefund,
    FailureNote,
    FirstOutcomes,
    RowRefusedError,
    StoreBusyError,
)
from paycore.store.rows import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentFile,
    PaymentRecord,
    PaymentRow,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
    Stamp,
)

_Read = TypeVar("_Read")

_BUSY_CODES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_PRIMARY_CODE_MASK = 0xFF

_ROWS_A_STATEMENT = 50
"""Rows in one insert: a statement of many costs less a row than many statements, up to about this number."""

_EXCESS_IN_RANGE = 500
"""How many payments with excess a look at a whole range of ids may name, before each id is asked for."""
_ROW_ERRORS = (sqlite3.IntegrityError, sqlite3.DataError)


def _insert_unless_there(table: Table) -> Any:
    return dialect.insert(table).on_conflict_do_nothing(index_elements=list(table.primary_key.columns))


def _outcome_sql() -> str:
    """The statement that inserts outcomes, compiled once; its parameters are an OutcomeRow, in order."""
    columns: dict[str, Any] = {column.name: bindparam(column.name) for column in tables.payment_outcome.columns}
    statement = _insert_unless_there(tables.payment_outcome).values(columns)
    return str(statement.compile(dialect=dialect.dialect(paramstyle="qmark")))


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


def _quarantine_statement(*, unless_counted: bool) -> Any:
    table = tables.quarantine
    statement = dialect.insert(table)
    newer = statement.excluded.last_seen_at_ms > table.c.last_seen_at_ms
    return statement.on_conflict_do_update(
        index_elements=[table.c.quarantine_id],
        set_={
            "last_seen_at_ms": statement.excluded.last_seen_at_ms,
            "arrivals": table.c.arrivals + statement.excluded.arrivals,
            "is_open": literal_column("1"),
        },
        where=newer if unless_counted else None,
    )


_INSERT_OUTCOME = _outcome_sql()
_INSERT_FIRST_OUTCOME = _first_outcomes_sql(1)
_INSERT_FIRST_OUTCOMES = _first_outcomes_sql(_ROWS_A_STATEMENT)
_INSERT_EXCESS = _insert_unless_there(tables.excess_payment)
_INSERT_REFUND = _insert_unless_there(tables.refund)
_INSERT_REFUND_TRY = _insert_unless_there(tables.refund_try)
_INSERT_REFUND_RESULT = _insert_unless_there(tables.refund_result)
_INSERT_PAYMENT = _insert_unless_there(tables.payment)
_INSERT_MERCHANT_ORDER = _insert_unless_there(tables.merchant_order)
_PUT_QUARANTINE = _quarantine_statement(unless_counted=False)
_PUT_QUARANTINE_AGAIN = _quarantine_statement(unless_counted=True)

_CONVERSATION_COLUMNS = (
    "state",
    "state_at_ms",
    "credential",
    "failure_code",
    "failure_message",
    "failed_at_ms",
    "superseded_at_ms",
    "lease_until_ms",
    "lease_token",
)
_TRY_COLUMNS = ("state", "state_at_ms", "asks", "next_at_ms", "lease_until_ms", "lease_token", "last_error")


def _note_failure_statement() -> Any:
    table = tables.channel_order
    ends = and_(bindparam("ends", type_=Boolean), table.c.state.not_in(FINALLY_UNPAID))
    return (
        update(table)
        .where(
            table.c.payment_id == bindparam("of_payment_id"),
            table.c.attempt == bindparam("of_attempt"),
            table.c.failed_at_ms.is_(None),
        )
        .values(
            failure_code=bindparam("code"),
            failure_message=bindparam("message"),
            failed_at_ms=bindparam("at_ms"),
            state=case((ends, AttemptState.FAILED.value), else_=table.c.state),
            state_at_ms=case((ends, bindparam("at_ms")), else_=table.c.state_at_ms),
        )
    )


_NOTE_FAILURE = _note_failure_statement()


class SqliteTransaction:
    """One write transaction; see ``store.protocol.WriteTransaction``."""

    def __init__(self, connection: Connection, stamp: Stamp) -> None:
        self._connection = connection
        self.stamp = stamp

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        with self._connection.begin_nested():
            yield

    def load_records(self, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
        return lookups.load_records(self._connection, payment_ids)

    def find_payment_id(self, merchant_id: str, merchant_order_no: str) -> int | None:
        return lookups.find_payment_id(self._connection, merchant_id, merchant_order_no)

    def insert_payment(self, row: PaymentRow) -> bool:
        return self._insert(_INSERT_PAYMENT, [row._asdict()]) == 1

    def insert_merchant_order(self, merchant_id: str, merchant_order_no: str, payment_id: int) -> bool:
        row = {
            "merchant_id": merchant_id,
            "merchant_order_no": merchant_order_no,
            "payment_id": payment_id,
            **self.stamp._asdict(),
        }
        return self._insert(_INSERT_MERCHANT_ORDER, [row]) == 1

    def insert_channel_order(self, row: ChannelOrderRow) -> None:
        self._connection.execute(insert(tables.channel_order), row._asdict())

    def update_channel_order(self, row: ChannelOrderRow, *, expected: Iterable[AttemptState]) -> bool:
        table = tables.channel_order
        statement = (
            update(table)
            .where(
                table.c.payment_id == row.payment_id,
                table.c.attempt == row.attempt,
                table.c.state.in_(list(expected)),
            )
            .values({name: getattr(row, name) for name in _CONVERSATION_COLUMNS})
        )
        return self._connection.execute(statement).rowcount == 1

    def supersede_attempts(self, payment_id: int, before_attempt: int, at_ms: int) -> None:
        condition = lookups.superseded_condition(payment_id, before_attempt)
        self._connection.execute(update(tables.channel_order).where(condition).values(superseded_at_ms=at_ms))

    def note_failures(self, notes: Sequence[FailureNote]) -> None:
        self._connection.execute(
            _NOTE_FAILURE,
            [
                {
                    "of_payment_id": note.payment_id,
                    "of_attempt": note.attempt,
                    "code": note.code,
                    "message": note.message,
                    "at_ms": note.failed_at_ms,
                    "ends": note.ends,
                }
                for note in notes
            ],
        )

    def insert_first_outcomes(self, outcomes: FirstOutcomes) -> set[int]:
        ids = outcomes.payment_ids
        excluded = self._with_excess(ids)
        if excluded:
            return excluded | self._insert_first_one_by_one(outcomes, excluded)
        whole = len(outcomes) - len(outcomes) % _ROWS_A_STATEMENT
        inserted = 0
        for start in range(0, whole, _ROWS_A_STATEMENT):
            values = outcomes.values(start, start + _ROWS_A_STATEMENT)
            inserted += self._insert_driver(_INSERT_FIRST_OUTCOMES, (*self._shared, *values))
        if whole < len(outcomes):
            inserted += self._insert_driver(
                _INSERT_FIRST_OUTCOME,
                [(*self._shared, *outcomes.values(row, row + 1)) for row in range(whole, len(outcomes))],
            )
        return set() if inserted == len(outcomes) else self._lost_outcomes(ids)

    def _insert_first_one_by_one(self, outcomes: FirstOutcomes, excluded: set[int]) -> set[int]:
        rows = {
            payment_id: (*self._shared, *outcomes.values(row, row + 1))
            for row, payment_id in enumerate(outcomes.payment_ids)
            if payment_id not in excluded
        }
        if not rows or self._insert_driver(_INSERT_FIRST_OUTCOME, list(rows.values())) == len(rows):
            return set()
        return self._lost_outcomes(list(rows))

    @property
    def _shared(self) -> tuple[int, int, int]:
        return (self.stamp.recorded_at_ms, self.stamp.writer_no, self.stamp.group_no)

    def _insert_driver(self, statement: str, values: Any) -> int:
        return self._connection.exec_driver_sql(statement, values).rowcount

    def _with_excess(self, payment_ids: Sequence[int]) -> set[int]:
        """Which of these payments, given ascending, have excess.

        Time-ordered ids lie close together, so one look at their range mostly answers for all.
        """
        in_range = lookups.excess_between(self._connection, payment_ids[0], payment_ids[-1], _EXCESS_IN_RANGE)
        if len(in_range) == _EXCESS_IN_RANGE:
            in_range = lookups.excess_of(self._connection, payment_ids)
        return in_range.intersection(payment_ids) if in_range else set()

    def insert_outcomes(self, rows: Sequence[OutcomeRow]) -> set[int]:
        if self._insert_driver(_INSERT_OUTCOME, list(rows)) == len(rows):
            return set()
        return self._lost_outcomes([row.payment_id for row in rows])

    def _lost_outcomes(self, payment_ids: Sequence[int]) -> set[int]:
        # A row count tells how many rows lost, not which. A row is ours when it carries this transaction's stamp.
        return set(payment_ids) - lookups.outcomes_of_group(self._connection, payment_ids, self.stamp)

    def insert_excess(self, rows: Sequence[ExcessRow]) -> None:
        if self._insert(_INSERT_EXCESS, [row._asdict() for row in rows]) != len(rows):
            raise StoreBusyError("an excess capture appeared while its group was decided")

    def insert_refunds(self, rows: Sequence[RefundRow], first_tries: Sequence[RefundTryRow]) -> None:
        self._insert(_INSERT_REFUND, [row._asdict() for row in rows])
        self._insert(_INSERT_REFUND_TRY, [row._asdict() for row in first_tries])

    def put_quarantine(self, rows: Sequence[QuarantineRow], *, maybe_counted: bool = False) -> None:
        statement = _PUT_QUARANTINE_AGAIN if maybe_counted else _PUT_QUARANTINE
        self._connection.execute(statement, [row._asdict() for row in rows])

    def excess_owing_refunds(self, limit: int) -> list[CaptureKey]:
        return lookups.excess_owing_refunds(self._connection, limit)

    def claim_refunds(self, now_ms: int, lease_until_ms: int, lease_token: str, limit: int) -> list[DueRefund]:
        claimed = []
        for due in lookups.due_refunds(self._connection, now_ms, limit):
            last_try = due.last_try._replace(lease_until_ms=lease_until_ms, lease_token=lease_token)
            self.update_refund_try(last_try, lease_token=due.last_try.lease_token)
            claimed.append(due._replace(last_try=last_try))
        return claimed

    def update_refund_try(self, row: RefundTryRow, *, lease_token: str) -> bool:
        table = tables.refund_try
        statement = (
            update(table)
            .where(
                table.c.payment_id == row.payment_id,
                table.c.refund_no == row.refund_no,
                table.c.seq == row.seq,
                table.c.lease_token == lease_token,
            )
            .values({name: getattr(row, name) for name in _TRY_COLUMNS})
        )
        return self._connection.execute(statement).rowcount == 1

    def insert_refund_try(self, row: RefundTryRow) -> bool:
        return self._insert(_INSERT_REFUND_TRY, [row._asdict()]) == 1

    def insert_refund_result(self, row: RefundResultRow) -> bool:
        return self._insert(_INSERT_REFUND_RESULT, [row._asdict()]) == 1

    def touch_writer(self) -> None:
        table = tables.writer
        self._connection.execute(
            update(table).where(table.c.writer_no == self.stamp.writer_no).values(seen_at_ms=self.stamp.recorded_at_ms)
        )

    def _insert(self, statement: Any, rows: list[dict[str, Any]]) -> int:
        return self._connection.execute(statement, rows).rowcount if rows else 0


class SqliteStore:
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

    def find_payment_id(self, merchant_id: str, merchant_order_no: str) -> int | None:
        return self._read(lambda connection: lookups.find_payment_id(connection, merchant_id, merchant_order_no))

    def load_record(self, payment_id: int) -> PaymentRecord | None:
        return self._read(lambda connection: lookups.load_records(connection, [payment_id]).get(payment_id))

    def load_file(self, payment_id: int) -> PaymentFile | None:
        return self._read(lambda connection: lookups.load_file(connection, payment_id))

    def owes_refunds(self) -> bool:
        return self._read(lambda connection: bool(lookups.excess_owing_refunds(connection, 1)))

    def expired_with_excess(self, expired_before_ms: int, limit: int) -> list[int]:
        return self._read(lambda connection: lookups.expired_with_excess(connection, expired_before_ms, limit))

    def has_due_refunds(self, now_ms: int) -> bool:
        return self._read(lambda connection: lookups.has_due_refunds(connection, now_ms))

    def backlog(self) -> Backlog:
        return self._read(lookups.backlog)

    def dispose(self) -> None:
        self._drop_connection()
        self._writing.dispose()
        self._reading.dispose()

    def _read(self, read: Callable[[Connection], _Read]) -> _Read:
        try:
            with self._translated(), self._reading.connect() as connection, connection.begin():
                return read(connection)
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
