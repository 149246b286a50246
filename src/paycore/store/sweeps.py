"""What the sweeper reads and marks: which payments to look at, everything about them, and how far it has come.

Functions over a connection whose transaction the caller owns; the same for every database. Which payments to look
at is asked in two ways. What each writer has added since the last look is read by the indexes on (writer_no,
group_no): a writer commits one group after another, so one number a writer says what has been seen. And a whole
range of payment_ids is compared table by table; the database answers with the payments that do not look whole.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    bindparam,
    delete,
    func,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

from paycore.domain.ids import slice_of
from paycore.domain.verdicts import ChannelResult, NotifyOutcome
from paycore.store import lookups, sweep_suspects, tables
from paycore.store.rows import PaymentRecord, RefundResultRow, RefundRow, RefundTryRow

NEW_ROWS = 10_000
"""Rows that are read of one writer at once: more than a commit holds."""

_CHUNK = 500

_FEEDS = {table.name: table for table in (tables.excess_payment, tables.refund, tables.queried_paid)}
"""The facts that are read writer by writer. The outcome is none of them: the accepted path keeps no second index."""

RecordsOf = Callable[[Sequence[int]], Mapping[int, PaymentRecord]]


class SweepCase(NamedTuple):
    """Everything about one payment that tells whether it is whole.

    queried: (attempt, when it was noted) of what the channel called paid. evidence: the attempts about whose money
    something lies in quarantine, open. tasks: (kind, attempt) of what repair is going to come back to.
    is_ordered: whether its merchant order names it.
    """

    record: PaymentRecord
    refunds: list[RefundRow]
    tries: list[RefundTryRow]
    results: list[RefundResultRow]
    queried: list[tuple[int, int]]
    evidence: set[int]
    tasks: set[tuple[int, int]]
    is_ordered: bool


class News(NamedTuple):
    """What was added since the last look. marks: table -> writer -> the last group seen. more: there is more."""

    payment_ids: set[int]
    marks: dict[str, dict[int, int]]
    more: bool


# ---- Marks


def marks(connection: Connection, sweep: str) -> dict[int, int]:
    """How far a sweep has come, by writer or by whatever else it counts."""
    mark = tables.sweep_mark
    statement = select(mark.c.writer_no, mark.c.group_no).where(mark.c.sweep == sweep)
    return {int(number): int(place) for number, place in connection.execute(statement)}


def put_marks(connection: Connection, sweep: str, places: Mapping[int, int]) -> None:
    """Write how far a sweep has come."""
    statement = _insert(connection, tables.sweep_mark)
    values = [{"sweep": sweep, "writer_no": number, "group_no": places[number]} for number in sorted(places)]
    if values:
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=list(tables.sweep_mark.primary_key.columns),
                set_={"group_no": statement.excluded.group_no},
            ),
            values,
        )


def drop_dead_marks(connection: Connection, living: Collection[int]) -> None:
    """Forget how far writers were read that are not among the living."""
    mark = tables.sweep_mark
    for name in _FEEDS:
        for dead in sorted(marks(connection, name).keys() - set(living)):
            connection.execute(delete(mark).where(mark.c.sweep == name, mark.c.writer_no == dead))


def _insert(connection: Connection, table: Table) -> Any:
    dialect: Any = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


# ---- What is looked at again


def pending(connection: Connection, after: int, limit: int) -> list[int]:
    """Payments that are looked at again, with an id above ``after``, ascending."""
    table = tables.sweep_pending
    statement = select(table.c.payment_id).where(table.c.payment_id > after).order_by(table.c.payment_id).limit(limit)
    return list(connection.execute(statement).scalars())


def pending_among(connection: Connection, payment_ids: Collection[int]) -> set[int]:
    """Those of these payments that are looked at again."""
    table, ids = tables.sweep_pending, sorted(payment_ids)
    return {
        payment_id
        for start in range(0, len(ids), _CHUNK)
        for payment_id in connection.execute(
            select(table.c.payment_id).where(table.c.payment_id.in_(ids[start : start + _CHUNK]))
        ).scalars()
    }


def remember(connection: Connection, payment_ids: Iterable[int], since_ms: int) -> list[int]:
    """Look at these payments again; return those that were not looked at again already."""
    table = tables.sweep_pending
    statement = _insert(connection, table).on_conflict_do_nothing(index_elements=[table.c.payment_id])
    new = []
    for payment_id in sorted(payment_ids):
        row = {"payment_id": payment_id, "slice": slice_of(payment_id), "since_ms": since_ms}
        if connection.execute(statement, row).rowcount == 1:
            new.append(payment_id)
    return new


def forget(connection: Connection, payment_ids: Iterable[int]) -> None:
    """Look at these payments no more."""
    table = tables.sweep_pending
    values = [{"whole": payment_id} for payment_id in sorted(payment_ids)]
    if values:
        connection.execute(delete(table).where(table.c.payment_id == bindparam("whole")), values)


# ---- What is new


def living_writers(connection: Connection, seen_since_ms: int) -> list[int]:
    """Writers that were seen since then."""
    table = tables.writer
    statement = select(table.c.writer_no).where(table.c.seen_at_ms >= seen_since_ms)
    # Sorted here: asked for in the order of the key, SQLite reads the whole table rather than the index.
    return sorted(connection.execute(statement).scalars())


def news(connection: Connection, writers: Sequence[int], limit: int = NEW_ROWS) -> News:
    """What these writers have added to the facts that are read writer by writer. In one snapshot."""
    found = News(set(), {}, more=False)
    for name, table in _FEEDS.items():
        seen, moved = marks(connection, name), found.marks.setdefault(name, {})
        for writer_no in writers:
            rows = _added(connection, table, writer_no, seen.get(writer_no, 0), limit)
            if rows:
                found.payment_ids.update(payment_id for _, payment_id in rows)
                moved[writer_no] = rows[-1][0]
            found = found._replace(more=found.more or len(rows) >= limit)
    return found


def _added(connection: Connection, table: Table, writer_no: int, after: int, limit: int) -> list[tuple[int, int]]:
    """(group_no, payment_id) of a writer's rows after a group, whole groups only."""
    of_writer = (table.c.writer_no == writer_no, table.c.group_no > after)
    statement = select(table.c.group_no, table.c.payment_id).where(*of_writer).order_by(table.c.group_no)
    rows = [(group_no, payment_id) for group_no, payment_id in connection.execute(statement.limit(limit))]
    if len(rows) < limit:
        return rows
    last = rows[-1][0]
    whole = [row for row in rows if row[0] < last]
    # A mark says that a group has been seen to its end.
    rest = connection.execute(statement.where(table.c.group_no <= last)) if not whole else ()
    return whole or [(group_no, payment_id) for group_no, payment_id in rest]


# ---- What does not look whole, by ranges of payment_ids


def end_of_part(connection: Connection, first: int, last: int, size: int) -> int:
    """The id that ends the first ``size`` payments of a range; ``last`` where there are no more."""
    table = tables.payment
    statement = select(table.c.payment_id).where(table.c.payment_id.between(first, last)).order_by(table.c.payment_id)
    found: int | None = connection.execute(statement.limit(1).offset(size - 1)).scalar_one_or_none()
    return last if found is None else found


def ends(connection: Connection) -> tuple[int, int]:
    """The lowest and the highest id of a payment; 0 and 0 where there is none."""
    # One statement each: a sharded engine takes no query in a SELECT list, and SQLite seeks for one end at a time.
    payment_id = tables.payment.c.payment_id
    lowest = connection.execute(select(func.min(payment_id))).scalar()
    highest = connection.execute(select(func.max(payment_id))).scalar()
    return lowest or 0, highest or 0


# ---- Everything about a payment


def load_cases(
    connection: Connection, payment_ids: Iterable[int], records_of: RecordsOf | None = None
) -> dict[int, SweepCase]:
    """Read payments with all that tells whether they are whole; those that do not exist are left out.

    records_of: reads the records, and may lock them first. Where each statement sees what was committed when it began,
    the order matters: what is done away with is read first, and what follows from something else after it.
    """
    cases: dict[int, SweepCase] = {}
    ids = sorted(set(payment_ids))
    for start in range(0, len(ids), _CHUNK):
        cases |= _load_chunk(connection, ids[start : start + _CHUNK], records_of)
    return cases


def _load_chunk(connection: Connection, ids: Sequence[int], records_of: RecordsOf | None) -> dict[int, SweepCase]:
    def rows(table: Table, *columns: Any, where: Sequence[ColumnElement[bool]] = ()) -> list[Any]:
        chosen = select(*(columns or (table,))).where(table.c.payment_id.in_(ids), *where)
        return list(connection.execute(chosen.order_by(table.c.payment_id)))

    task, queried, evidence = tables.task.c, tables.queried_paid.c, tables.quarantine.c
    tasks = rows(tables.task, task.payment_id, task.kind, task.attempt)
    noted = rows(tables.queried_paid, queried.payment_id, queried.attempt, queried.recorded_at_ms)
    # Rows of other tables may name a payment that does not exist.
    ids = [payment_id for (payment_id,) in rows(tables.payment, tables.payment.c.payment_id)]
    records = lookups.load_records(connection, ids) if records_of is None else records_of(ids)
    ordered = sweep_suspects.ordered(connection, [record.payment for record in records.values()])
    cases = {
        payment_id: SweepCase(record, [], [], [], [], set(), set(), payment_id in ordered)
        for payment_id, record in records.items()
    }
    for result in map(RefundResultRow._make, rows(tables.refund_result)):
        cases[result.payment_id].results.append(result)
    for refund in map(RefundRow._make, rows(tables.refund)):
        cases[refund.payment_id].refunds.append(refund)
    for one in map(RefundTryRow._make, rows(tables.refund_try)):
        cases[one.payment_id].tries.append(one)
    # A second capture accounts for no first one, which may still have to be judged.
    is_first = evidence.reason != NotifyOutcome.SECOND_CAPTURE
    is_money = (tables.QUARANTINE_OPEN, evidence.result == ChannelResult.SUCCESS, is_first)
    for payment_id, attempt in rows(tables.quarantine, evidence.payment_id, evidence.attempt, where=is_money):
        cases[payment_id].evidence.add(attempt)
    for payment_id, kind, attempt in tasks:
        if payment_id in cases:
            cases[payment_id].tasks.add((kind, attempt))
    for payment_id, attempt, at_ms in noted:
        if payment_id in cases:
            cases[payment_id].queried.append((attempt, at_ms))
    return cases
