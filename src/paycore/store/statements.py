"""What a write transaction says to every database alike, over SQLAlchemy Core.

A database's own module adds how first outcomes are inserted, what holds the rows that a decision rests on, and which
errors of its driver mean what. Every statement names the payments that it touches, rows go out in the order of their
keys, and nothing reads rows of many payments and writes in one statement: a database sharded by payment_id runs each.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import (
    Boolean,
    Connection,
    Dialect,
    Table,
    and_,
    bindparam,
    case,
    literal_column,
    or_,
    update,
)

from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState
from paycore.store import columns, lookups, refunds, tables, tasks
from paycore.store.columns import IndexColumns
from paycore.store.protocol import DueRefund, FailureNote, StoreBusyError
from paycore.store.rows import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentRecord,
    PaymentRow,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
    Stamp,
    TaskRow,
)

_T = TypeVar("_T")

_EXCESS_IN_RANGE = 500
"""How many payments with excess a look at a whole range of ids may name, before each id is asked for."""

_FEW_IDS = 64
"""So many are asked for one by one; more are looked at as two ranges."""

_ROWS_A_STATEMENT = (50, 10, 3, 1)
"""Rows in one insert, as many as there are left for: each statement gives up the interpreter once, and has to get it
back from the other threads. 50 rows of the widest table stay far below every database's limit on parameters.
"""

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


class Inserts:
    """The inserts that do nothing, or count, where their key is there; built once a database.

    insert: the dialect's own, which knows ON CONFLICT. dialect: with a positional paramstyle. Each is the driver's SQL,
    whose parameters are a table's columns in their order: rows go to the driver as they are.
    """

    def __init__(self, insert: Callable[[Table], Any], dialect: Dialect) -> None:
        def compiled(statement: Any, table: Table) -> str:
            names = [column.name for column in table.columns]
            made = statement.values({name: bindparam(name) for name in names}).compile(dialect=dialect)
            assert made.positiontup == names, "a row is handed over in the order of its table's columns"
            return str(made)

        def unless_there(table: Table) -> str:
            key = list(table.primary_key.columns)
            return compiled(insert(table).on_conflict_do_nothing(index_elements=key), table)

        self.outcome = unless_there(tables.payment_outcome)
        self.excess = unless_there(tables.excess_payment)
        self.refund = unless_there(tables.refund)
        self.refund_try = unless_there(tables.refund_try)
        self.refund_result = unless_there(tables.refund_result)
        self.payment = unless_there(tables.payment)
        self.merchant_order = unless_there(tables.merchant_order)
        self.queried_paid = unless_there(tables.queried_paid)
        self.channel_order = compiled(insert(tables.channel_order), tables.channel_order)
        self.task = compiled(tasks.insert_or_hasten(insert), tables.task)
        self.quarantine = compiled(_quarantine(insert, unless_counted=False), tables.quarantine)
        self.quarantine_again = compiled(_quarantine(insert, unless_counted=True), tables.quarantine)


def _quarantine(insert: Callable[[Table], Any], *, unless_counted: bool) -> Any:
    table = tables.quarantine
    statement = insert(table)
    newer = statement.excluded.last_seen_at_ms > table.c.last_seen_at_ms
    return statement.on_conflict_do_update(
        index_elements=[table.c.quarantine_id],
        set_={
            # Evidence that is judged again under another reason comes with the moment of its first arrival.
            "last_seen_at_ms": case((newer, statement.excluded.last_seen_at_ms), else_=table.c.last_seen_at_ms),
            "arrivals": table.c.arrivals + statement.excluded.arrivals,
            "is_open": literal_column("1"),
        },
        # What was counted already left the row open.
        where=or_(newer, table.c.is_open == literal_column("0")) if unless_counted else None,
    )


def _note_failure() -> Any:
    table = tables.channel_order
    # Compared one by one: a list of values cannot go with many rows.
    goes_on = [table.c.state != state.value for state in sorted(FINALLY_UNPAID)]
    ends = and_(bindparam("ends", type_=Boolean), *goes_on)
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


def _claim_refund() -> Any:
    """Lease a try that is as it was read: one that somebody else has leased or moved meanwhile is not touched."""
    table = tables.refund_try
    as_read = [table.c[name] == bindparam(f"read_{name}") for name in _CLAIM_READS]
    leased: dict[str, Any] = {name: bindparam(f"new_{name}") for name in ("lease_until_ms", "lease_token")}
    return update(table).where(*as_read).values(leased)


_CLAIM_READS = ("payment_id", "refund_no", "seq", "state", "asks", "next_at_ms", "lease_until_ms", "lease_token")
_CLAIM_REFUND = _claim_refund()
_NOTE_FAILURE = _note_failure()


class SqlTransaction:
    """One write transaction; see ``store.protocol.WriteTransaction``. Its connection must preserve row counts."""

    def __init__(self, connection: Connection, stamp: Stamp, inserts: Inserts, insert: Callable[[Table], Any]) -> None:
        self._connection = connection
        self._inserts = inserts
        self._dialect_insert = insert
        self.stamp = stamp

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        with self._connection.begin_nested():
            yield

    def load_records(self, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
        return lookups.load_records(self._connection, payment_ids)

    def index_columns_of(self, payment_ids: Sequence[int]) -> IndexColumns:
        return columns.columns_of(self._connection, payment_ids)

    def find_payment_id(self, merchant_id: str, merchant_order_no: str) -> int | None:
        return lookups.find_payment_id(self._connection, merchant_id, merchant_order_no)

    def insert_payment(self, row: PaymentRow) -> bool:
        return self._insert(self._inserts.payment, [row]) == 1

    def insert_merchant_order(self, merchant_id: str, merchant_order_no: str, payment_id: int) -> bool:
        row = (merchant_id, merchant_order_no, payment_id, *self.stamp)
        return self._insert(self._inserts.merchant_order, [row]) == 1

    def insert_channel_order(self, row: ChannelOrderRow) -> None:
        self._insert(self._inserts.channel_order, [row])

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
                for note in sorted(notes, key=lambda note: note[:2])
            ],
        )

    def insert_outcomes(self, rows: Sequence[OutcomeRow]) -> set[int]:
        if self._insert(self._inserts.outcome, sorted(rows)) == len(rows):
            return set()
        return self._lost_outcomes([row.payment_id for row in rows])

    def _lost_outcomes(self, payment_ids: Sequence[int]) -> set[int]:
        # A row count tells how many rows lost, not which. A row is ours when it carries this transaction's stamp.
        return set(payment_ids) - lookups.outcomes_of_group(self._connection, payment_ids, self.stamp)

    def _with_excess(self, payment_ids: Sequence[int]) -> set[int]:
        """Which of these payments, given ascending, have excess.

        Time-ordered ids lie close together, so one look at their range mostly answers for all.
        """
        in_range = lookups.excess_between(self._connection, payment_ids[0], payment_ids[-1], _EXCESS_IN_RANGE)
        if len(in_range) < _EXCESS_IN_RANGE:
            return in_range.intersection(payment_ids) if in_range else set()
        if len(payment_ids) <= _FEW_IDS:
            return lookups.excess_of(self._connection, payment_ids)
        # Mostly one payment far from the others has stretched the range: it stands at an end.
        middle = len(payment_ids) // 2
        return self._with_excess(payment_ids[:middle]) | self._with_excess(payment_ids[middle:])

    def insert_excess(self, rows: Sequence[ExcessRow]) -> None:
        if self._insert(self._inserts.excess, sorted(rows, key=lambda row: row[:3])) != len(rows):
            raise StoreBusyError("an excess capture appeared while its group was decided")

    def insert_refunds(self, rows: Sequence[RefundRow], first_tries: Sequence[RefundTryRow]) -> None:
        self._insert(self._inserts.refund, sorted(rows))
        self._insert(self._inserts.refund_try, sorted(first_tries))

    def evidence_on_record(self, quarantine_ids: Collection[str]) -> dict[str, tuple[int, int]]:
        return lookups.evidence_on_record(self._connection, quarantine_ids)

    def put_quarantine(self, rows: Sequence[QuarantineRow], *, maybe_counted: bool = False) -> None:
        statement = self._inserts.quarantine_again if maybe_counted else self._inserts.quarantine
        by_key = sorted(rows)
        self._insert(statement, by_key)

    def claim_refunds(
        self,
        slices: Sequence[int],
        now_ms: int,
        lease_until_ms: int,
        lease_token: str,
        limit: int,
        accounts: Collection[tuple[str, str]] | None = None,
    ) -> list[DueRefund]:
        claimed = []
        for due in refunds.due_refunds(self._connection, slices, now_ms, limit, accounts):
            last_try = due.last_try._replace(lease_until_ms=lease_until_ms, lease_token=lease_token)
            changes = {"new_lease_until_ms": lease_until_ms, "new_lease_token": lease_token}
            as_read = {f"read_{name}": getattr(due.last_try, name) for name in _CLAIM_READS}
            # Whoever claims at the same moment waits here for the row, finds it changed and leaves it.
            if self._connection.execute(_CLAIM_REFUND, {**as_read, **changes}).rowcount == 1:
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
        return self._insert(self._inserts.refund_try, [row]) == 1

    def insert_refund_result(self, row: RefundResultRow) -> bool:
        return self._insert(self._inserts.refund_result, [row]) == 1

    def note_queried_paid(self, payment_id: int, attempt: int) -> bool:
        return self._insert(self._inserts.queried_paid, [(payment_id, attempt, *self.stamp)]) == 1

    def put_tasks(self, rows: Iterable[TaskRow]) -> None:
        self._insert(self._inserts.task, sorted(rows))

    def move_task(self, read: TaskRow, row: TaskRow) -> bool:
        return tasks.move_task(self._connection, read, row)

    def drop_tasks(self, rows: Iterable[TaskRow]) -> int:
        return tasks.drop_tasks(self._connection, rows)

    def claim_slices(self, job: str, slices: Iterable[int], now_ms: int, lease_until_ms: int, token: str) -> list[int]:
        return tasks.claim_slices(self._connection, self._dialect_insert, job, slices, now_ms, lease_until_ms, token)

    def release_slices(self, job: str, slices: Iterable[int], token: str) -> None:
        tasks.release_slices(self._connection, job, slices, token)

    def run(self, work: Callable[[Connection], _T]) -> _T:
        return work(self._connection)

    def touch_writer(self) -> None:
        table = tables.writer
        self._connection.execute(
            update(table).where(table.c.writer_no == self.stamp.writer_no).values(seen_at_ms=self.stamp.recorded_at_ms)
        )

    def _insert(self, statement: str, rows: Sequence[tuple[object, ...]]) -> int:
        """Insert rows of one table, no two with one key; return how many went in."""
        inserted = start = 0
        for size in _ROWS_A_STATEMENT:
            stop = len(rows) - (len(rows) - start) % size
            if stop > start:
                parts = [_flat(rows[place : place + size]) for place in range(start, stop, size)]
                inserted += self._connection.exec_driver_sql(_of_rows(statement, size), parts).rowcount
            start = stop
        return inserted


def _flat(rows: Iterable[tuple[object, ...]]) -> tuple[object, ...]:
    return tuple(value for row in rows for value in row)


@functools.cache
def _of_rows(statement: str, size: int) -> str:
    """The same insert for so many rows."""
    head, values, tail = re.fullmatch(r"(.* VALUES )(\([^()]*\))(.*)", statement, re.DOTALL).groups()  # type: ignore[union-attr]
    return head + ", ".join([values] * size) + tail
