"""Reads that are the same for every database. Each takes a connection whose transaction the caller owns."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    func,
    literal,
    select,
)

from paycore.domain.verdicts import AttemptState
from paycore.store import tables
from paycore.store.protocol import Backlog
from paycore.store.records import load_records as load_records  # callers know it from here
from paycore.store.rows import (
    MAX_QUARANTINE_IN_FILE,
    PaymentFile,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
    Stamp,
)

_Id = TypeVar("_Id", int, str)

_CHUNK = 500
"""Ids in one IN list: far below every database's limit on parameters."""


def _one_of(
    connection: Connection, column: ColumnElement[_Id], ids: Sequence[_Id], kind: type[BigInteger | Text] = BigInteger
) -> ColumnElement[bool]:
    """Tell whether a column is one of these ids: an array where there are arrays, so that the statement is one."""
    if connection.dialect.name == "postgresql":
        return column == any_(literal(ids, ARRAY(kind)))
    return column.in_(bindparam("ids", ids, expanding=True))


def _chunks(ids: Sequence[_Id]) -> Iterator[Sequence[_Id]]:
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]


def find_payment_id(connection: Connection, merchant_id: str, merchant_order_no: str) -> int | None:
    """Look up a merchant order."""
    table = tables.merchant_order
    return connection.execute(
        select(table.c.payment_id).where(
            table.c.merchant_id == merchant_id, table.c.merchant_order_no == merchant_order_no
        )
    ).scalar_one_or_none()


def load_file(connection: Connection, payment_id: int) -> PaymentFile | None:
    """Read everything about one payment."""
    record = load_records(connection, [payment_id]).get(payment_id)
    if record is None:
        return None

    def rows(table: Table, *order: ColumnElement[Any]) -> Any:
        return connection.execute(select(table).where(table.c.payment_id == payment_id).order_by(*order))

    refund, evidence = tables.refund, tables.quarantine
    tries, results = tables.refund_try, tables.refund_result
    of_payment = evidence.c.payment_id == payment_id
    first_seen = select(evidence).where(of_payment).order_by(evidence.c.first_seen_at_ms, evidence.c.quarantine_id)
    return PaymentFile(
        record,
        [RefundRow(*row) for row in rows(refund, refund.c.recorded_at_ms, refund.c.refund_no)],
        [RefundTryRow(*row) for row in rows(tries, tries.c.refund_no, tries.c.seq)],
        [RefundResultRow(*row) for row in rows(results, results.c.refund_no, results.c.seq)],
        [QuarantineRow(*row) for row in connection.execute(first_seen.limit(MAX_QUARANTINE_IN_FILE))],
        connection.execute(select(func.count()).select_from(evidence).where(of_payment)).scalar_one(),
    )


def outcomes_of_group(connection: Connection, payment_ids: Sequence[int], stamp: Stamp) -> set[int]:
    """Which of these payments have an outcome that carries this writer's and group's numbers."""
    table = tables.payment_outcome
    own = (table.c.writer_no == stamp.writer_no, table.c.group_no == stamp.group_no)
    return {
        payment_id
        for ids in _chunks(payment_ids)
        for payment_id in connection.execute(
            select(table.c.payment_id).where(_one_of(connection, table.c.payment_id, ids), *own)
        ).scalars()
    }


_EXCESS_BETWEEN = (
    select(tables.excess_payment.c.payment_id)
    .where(tables.excess_payment.c.payment_id.between(bindparam("first"), bindparam("last")))
    .distinct()
    .limit(bindparam("at_most"))
)


def excess_between(connection: Connection, first: int, last: int, limit: int) -> set[int]:
    """Payments with excess in a range of ids, both ends included; ``limit`` of them when there may be more."""
    found = connection.execute(_EXCESS_BETWEEN, {"first": first, "last": last, "at_most": limit})
    return set(found.scalars())


def excess_of(connection: Connection, payment_ids: Sequence[int]) -> set[int]:
    """Which of these payments have excess."""
    table = tables.excess_payment
    return {
        payment_id
        for ids in _chunks(payment_ids)
        for payment_id in connection.execute(
            select(table.c.payment_id).where(_one_of(connection, table.c.payment_id, ids))
        ).scalars()
    }


def evidence_on_record(connection: Connection, quarantine_ids: Collection[str]) -> dict[str, tuple[int, int]]:
    """Which of this evidence lies in quarantine, each with the (writer_no, group_no) that put it there first."""
    table = tables.quarantine
    columns = (table.c.quarantine_id, table.c.writer_no, table.c.group_no)
    return {
        quarantine_id: (writer_no, group_no)
        for ids in _chunks(sorted(quarantine_ids))
        for quarantine_id, writer_no, group_no in connection.execute(
            select(*columns).where(_one_of(connection, table.c.quarantine_id, ids, Text))
        )
    }


def backlog(connection: Connection) -> Backlog:
    """Count open quarantine, and find the refunds that have no final word."""
    evidence, refund, tries = tables.quarantine, tables.refund, tables.refund_try
    quarantine_open, oldest_evidence = connection.execute(
        select(func.count(), func.min(evidence.c.first_seen_at_ms)).where(tables.QUARANTINE_OPEN)
    ).one()
    oldest = connection.execute(
        select(func.min(refund.c.recorded_at_ms))
        .join(tries, and_(tries.c.payment_id == refund.c.payment_id, tries.c.refund_no == refund.c.refund_no))
        .where(tables.REFUND_UNFINISHED)
    ).scalar_one()
    attention = connection.execute(
        select(func.count()).select_from(tries).where(tables.REFUND_UNFINISHED, tables.REFUND_NEEDS_ATTENTION)
    ).scalar_one()
    return Backlog(quarantine_open, oldest, attention, oldest_evidence)


def superseded_condition(payment_id: int, before_attempt: int) -> ColumnElement[bool]:
    """The older attempts of a payment that a channel may still take money for and that are not queued yet."""
    table = tables.channel_order
    return and_(
        table.c.payment_id == payment_id,
        table.c.attempt < before_attempt,
        table.c.superseded_at_ms.is_(None),
        table.c.state.in_((AttemptState.CREATING, AttemptState.OPEN, AttemptState.UNKNOWN)),
    )
