"""The store on PostgreSQL: one writer connection in READ COMMITTED, readers on snapshots beside it.

What holds under processes that write at the same time:

* A first outcome takes no lock: its key arbitrates. An insert that meets the same key, committed or not, waits for
  that transaction and then does nothing, and the payment is read again by a statement of its own.
* Every other decision holds the payment's row (``lock_records``) from before it reads until it commits, so that
  attempts, excess, failures and CLOSED of one payment are decided one after another. Rows are locked in
  ascending order, each by a statement of its own.
* An excess capture of a payment without outcome must not meet a first outcome that was written without having seen it.
  Whoever writes such an excess holds the outcome's key until its commit (``hold_open``), and whoever writes first
  outcomes looks for excess once more after them: either it waited for that key, and then sees the excess, or its
  outcome was there first, and then ``hold_open`` tells of it.
* Inserts in other orders may deadlock. The server ends one of the two, which is decided again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format, TransactionStatus
from sqlalchemy import Connection, CursorResult, Engine, RootTransaction, delete, insert
from sqlalchemy.dialects import postgresql as dialect
from sqlalchemy.dialects.postgresql import psycopg as psycopg_dialect
from sqlalchemy.exc import DBAPIError

from paycore.domain.errors import StoreUnavailableError
from paycore.domain.verdicts import CaptureSource, CloseReason, PaymentState
from paycore.failpoint import FailpointError, failpoint
from paycore.store import tables
from paycore.store.database import DatabaseRefusedError
from paycore.store.postgresql_server import PostgresqlServer
from paycore.store.protocol import CommitUnknownError, FirstOutcomes, RowRefusedError, StoreBusyError
from paycore.store.reading import SqlReads
from paycore.store.rows import OutcomeRow, PaymentRecord, Stamp
from paycore.store.statements import Inserts, SqlTransaction

_Read = TypeVar("_Read")

_BUSY_STATES = {
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available: lock_timeout
    "57014",  # query_canceled: statement_timeout
}
_LIMIT_CLASS = "54"
"""program_limit_exceeded: a text too long for its index, for example."""

_HELD = "(held open)"
"""Marks the outcomes that only hold a key until the commit; no transaction ends with one."""


class LostConnectionError(StoreBusyError):
    """The connection broke before the commit was sent, so nothing was kept. A new one may do."""


class _Column:
    """A column as PostgreSQL's binary array, ready made."""

    __slots__ = ("array",)

    def __init__(self, array: bytes) -> None:
        self.array = array


class _Int8Column(_Column):
    __slots__ = ()


class _Int2Column(_Column):
    __slots__ = ()


class _TextColumn(_Column):
    __slots__ = ()


class _ColumnDumper(Dumper):
    """Hands the array's bytes over as they are."""

    format = Format.BINARY
    array_oid: ClassVar[int]

    def __init__(self, cls: type, context: AdaptContext | None = None) -> None:
        super().__init__(cls, context)
        self.oid = self.array_oid

    def dump(self, obj: _Column) -> bytes:
        return obj.array


def _dumper(oid: int) -> type[_ColumnDumper]:
    return type(f"_Dumper{oid}", (_ColumnDumper,), {"array_oid": oid})


# The types of the arrays, as in PostgreSQL's src/include/catalog/pg_type.dat: _int8, _int2, _text.
_DUMPERS = {_Int8Column: _dumper(1016), _Int2Column: _dumper(1005), _TextColumn: _dumper(1009)}
_COLUMNS = (
    *(_Int8Column, _Int2Column, _TextColumn, _Int8Column),
    *(_TextColumn, _Int8Column, _Int8Column, _Int2Column),
)

_INSERT_FIRST_OUTCOMES = f"""
INSERT INTO payment_outcome (payment_id, state, attempt, channel_trade_no, amount_minor, currency, paid_at_ms,
  received_at_ms, source, paid_at_untrusted, close_reason, recorded_at_ms, writer_no, group_no)
SELECT payment_id, {PaymentState.PAID:d}, attempt, channel_trade_no, amount_minor, currency, paid_at_ms,
  received_at_ms, {CaptureSource.NOTIFICATION:d}, paid_at_untrusted, 0, %s::bigint, %s::bigint, %s::bigint
FROM unnest(%b::bigint[], %b::smallint[], %b::text[], %b::bigint[], %b::text[], %b::bigint[], %b::bigint[],
  %b::smallint[]) AS first (payment_id, attempt, channel_trade_no, amount_minor, currency, paid_at_ms,
  received_at_ms, paid_at_untrusted)
WHERE payment_id <> ALL (%s::bigint[])
ON CONFLICT (payment_id) DO NOTHING
RETURNING payment_id
"""  # noqa: S608 - no input

# One payment a statement: a sharded database locks rows of one shard at a time. NO KEY UPDATE excludes its like and
# lets whoever only reads, or refers to the key, pass.
_LOCK_PAYMENT = "SELECT 1 FROM payment WHERE payment_id = %s FOR NO KEY UPDATE"

_INSERTS = Inserts(
    dialect.insert,
    psycopg_dialect.dialect(paramstyle="format"),  # type: ignore[no-untyped-call]
)


class PostgresqlTransaction(SqlTransaction):
    """One write transaction in READ COMMITTED: each statement sees what was committed when it began."""

    def __init__(self, connection: Connection, stamp: Stamp) -> None:
        super().__init__(connection, stamp, _INSERTS, dialect.insert)

    def lock_records(self, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
        ids = sorted(set(payment_ids))
        if not ids:
            return {}
        # The driver sends the many statements in one go.
        self._connection.exec_driver_sql(_LOCK_PAYMENT, [(payment_id,) for payment_id in ids])
        # Read by statements of their own, which see what the lock was waited for.
        return self.load_records(ids)

    def insert_first_outcomes(self, outcomes: FirstOutcomes) -> set[int]:
        ids = outcomes.payment_ids
        excluded = self._with_excess(ids)
        arrays = [column(array) for column, array in zip(_COLUMNS, outcomes.arrays(), strict=True)]
        inserted = self._connection.exec_driver_sql(
            _INSERT_FIRST_OUTCOMES,
            (self.stamp.recorded_at_ms, self.stamp.writer_no, self.stamp.group_no, *arrays, sorted(excluded)),
        )
        if self._with_excess(ids) - excluded:
            raise StoreBusyError("an excess capture appeared while first outcomes were inserted")
        # Counted by the rows that came back: a sharded engine may say how many were tried (Citus, issue 3377).
        if _rows_returned(inserted) == len(ids) - len(excluded):
            return excluded
        return set(ids) - set(inserted.scalars())

    def hold_open(self, payment_ids: Sequence[int]) -> set[int]:
        # A row inserted and deleted by this transaction keeps its key from others until the commit.
        ids = sorted(payment_ids)
        held = (PaymentState.CLOSED, 0, _HELD, 0, "", None, 0, 0, 0, CloseReason.MERCHANT)
        lost = self.insert_outcomes([OutcomeRow(payment_id, *held, *self.stamp) for payment_id in ids])
        table = tables.payment_outcome
        for payment_id in ids:
            if payment_id not in lost:
                own = (table.c.payment_id == payment_id, table.c.channel_trade_no == _HELD)
                self._connection.execute(delete(table).where(*own))
        return lost


class PostgresqlStore(SqlReads):
    """A database on a server; see ``store.protocol.Store``. ``write`` belongs to one thread, the reads to any."""

    def __init__(self, server: PostgresqlServer) -> None:
        self._server = server
        self._writing: Engine = server.engine(writes=True)
        self._reading: Engine = server.engine(writes=False)
        self._connection: Connection | None = None
        self._warnings: list[str] = []

    def open_writer(self, started_at_ms: int) -> int:
        try:
            with self._transaction(_no_mark) as connection:
                result = connection.execute(
                    insert(tables.writer).values(started_at_ms=started_at_ms, seen_at_ms=started_at_ms)
                )
                key = result.inserted_primary_key
        except CommitUnknownError as error:
            # A number that nobody uses does no harm.
            raise StoreBusyError("it is not known whether a writer's number was committed") from error
        assert key is not None, "the database numbers the rows of this table"
        return int(key[0])

    @contextmanager
    def write(self, stamp: Stamp) -> Iterator[PostgresqlTransaction]:
        with self._transaction(failpoint) as connection:
            failpoint("store.begun")
            yield PostgresqlTransaction(connection, stamp)
            failpoint("store.before_commit")

    @contextmanager
    def _transaction(self, mark: Callable[[str], None]) -> Iterator[Connection]:
        try:
            with self._translated():
                connection = self._writer_connection()
                with connection.begin() as transaction:
                    yield connection
                    self._commit(connection, transaction, mark)
        except StoreUnavailableError:
            # Another server may have taken over when the next group comes.
            self._drop_connection()
            raise
        except BaseException:
            self._drop_connection(only_broken=True)
            raise

    def _commit(self, connection: Connection, transaction: RootTransaction, mark: Callable[[str], None]) -> None:
        driver = _driver(connection)
        if driver.info.transaction_status == TransactionStatus.INERROR:
            # The server would take COMMIT for ROLLBACK, and say so in a word that no driver makes an error of.
            raise StoreBusyError("a statement of the transaction failed and was passed over")
        self._warnings.clear()
        try:
            transaction.commit()
            mark("store.committed")
        except DBAPIError as error:
            if not driver.closed:
                # The server has answered, and said no.
                raise self._translate(error) from error
            raise CommitUnknownError(_said(error.orig)) from error
        except FailpointError as error:
            raise CommitUnknownError(str(error)) from error
        if self._warnings:
            # Committed on the primary, and the wait for its standby was cut short.
            raise CommitUnknownError("; ".join(self._warnings))

    def dispose(self) -> None:
        self._drop_connection()
        self._writing.dispose()
        self._reading.dispose()

    def read(self, look: Callable[[Connection], _Read]) -> _Read:
        try:
            try:
                return self._read_once(look)
            except LostConnectionError:
                # One that lay in the pool while the server was away; the pool has thrown out the others with it.
                return self._read_once(look)
        except StoreBusyError as error:
            # Only writes are run again; a reader's caller is told that a retry can help.
            raise StoreUnavailableError("STORE_BUSY", f"the database did not answer in time: {error}") from error

    def _read_once(self, look: Callable[[Connection], _Read]) -> _Read:
        with self._translated(), self._reading.connect() as connection, connection.begin():
            return look(connection)

    def _writer_connection(self) -> Connection:
        if self._connection is None:
            connection = self._writing.connect()
            driver = _driver(connection)
            for kind, dumper in _DUMPERS.items():
                driver.adapters.register_dumper(kind, dumper)
            driver.add_notice_handler(self._note_warning)
            self._connection = connection
        return self._connection

    def _note_warning(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warnings.append(notice.message_primary or "")

    def _drop_connection(self, *, only_broken: bool = False) -> None:
        connection = self._connection
        if connection is None or (only_broken and not (connection.invalidated or _driver(connection).closed)):
            return
        connection.invalidate()
        connection.close()
        self._connection = None

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the driver's errors into those of ``store.protocol``."""
        try:
            yield
        except (DBAPIError, psycopg.Error) as error:
            raise self._translate(error) from error
        except DatabaseRefusedError as error:
            raise StoreUnavailableError("STORE_UNAVAILABLE", str(error)) from error
        except FailpointError as error:
            raise StoreBusyError(f"failpoint {error}") from error

    def _translate(self, error: DBAPIError | psycopg.Error) -> Exception:
        cause = error.orig if isinstance(error, DBAPIError) else error
        state = getattr(cause, "sqlstate", None) or ""
        if isinstance(cause, (psycopg.IntegrityError, psycopg.DataError)) or state.startswith(_LIMIT_CLASS):
            return RowRefusedError(_said(cause))
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            return LostConnectionError(_said(cause))
        if state in _BUSY_STATES:
            return StoreBusyError(_said(cause))
        return StoreUnavailableError("STORE_UNAVAILABLE", f"the database cannot be used: {_said(cause)}")


def _no_mark(_name: str) -> None:
    """A failpoint's place in a transaction that is no group's."""


def _rows_returned(result: CursorResult[Any]) -> int:
    """How many rows a statement has returned, before they are fetched."""
    returned: int = result.cursor.pgresult.ntuples
    return returned


def _driver(connection: Connection) -> Any:
    """The driver's own connection."""
    return connection.connection.driver_connection


def _said(error: BaseException | None) -> str:
    """The driver's message in one line, without the row that the server may quote in its details."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return primary or " ".join(str(error).split())
