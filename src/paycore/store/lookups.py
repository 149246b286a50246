"""Reads that are the same for every database. Each takes a connection whose transaction the caller owns."""

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Table,
    Text,
    and_,
    bindparam,
    func,
    select,
)

from paycore.domain.verdicts import AttemptState
from paycore.store import tables
from paycore.store.by_ids import ByIds
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

_OUTCOME, _EXCESS, _EVIDENCE = tables.payment_outcome.c, tables.excess_payment.c, tables.quarantine.c
_OUTCOMES_OF = ByIds(select(_OUTCOME.payment_id, _OUTCOME.writer_no, _OUTCOME.group_no), _OUTCOME.payment_id)
_EXCESS_OF = ByIds(select(_EXCESS.payment_id), _EXCESS.payment_id)
_EVIDENCE_OF = ByIds(
    select(_EVIDENCE.quarantine_id, _EVIDENCE.writer_no, _EVIDENCE.group_no), _EVIDENCE.quarantine_id, Text
)


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
    own = (stamp.writer_no, stamp.group_no)
    return {payment_id for payment_id, *numbers in _OUTCOMES_OF.fetch(connection, payment_ids) if tuple(numbers) == own}


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
    return {payment_id for (payment_id,) in _EXCESS_OF.fetch(connection, payment_ids)}


def evidence_on_record(connection: Connection, quarantine_ids: Collection[str]) -> dict[str, tuple[int, int]]:
    """Which of this evidence lies in quarantine, each with the (writer_no, group_no) that put it there first."""
    rows = _EVIDENCE_OF.fetch(connection, sorted(quarantine_ids))
    return {quarantine_id: (writer_no, group_no) for quarantine_id, writer_no, group_no in rows}


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
