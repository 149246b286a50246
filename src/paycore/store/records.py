"""Payments with all that decides about their captures, by their ids."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Table, select

from paycore.store import tables
from paycore.store.by_ids import MOST_IDS, ByIds
from paycore.store.rows import ChannelOrderRow, ExcessRow, OutcomeRow, PaymentRecord, PaymentRow


def load_records(connection: Connection, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
    """Read payments with attempts, outcome and excess; those that do not exist are left out."""
    records: dict[int, PaymentRecord] = {}
    ids = sorted(set(payment_ids))
    for start in range(0, len(ids), MOST_IDS):
        _load_some(connection, ids[start : start + MOST_IDS], records)
    return records


def _load_some(connection: Connection, ids: Sequence[int], records: dict[int, PaymentRecord]) -> None:
    for payment in map(PaymentRow._make, _rows(connection, tables.payment, ids)):
        records[payment.payment_id] = PaymentRecord(payment)
    # A payment that was committed after the statement before is one that is not there yet.
    for attempt in map(ChannelOrderRow._make, _rows(connection, tables.channel_order, ids)):
        if record := records.get(attempt.payment_id):
            record.attempts[attempt.attempt] = attempt
    for outcome in map(OutcomeRow._make, _rows(connection, tables.payment_outcome, ids)):
        if record := records.get(outcome.payment_id):
            record.outcome = outcome
    for excess in map(ExcessRow._make, _rows(connection, tables.excess_payment, ids)):
        if record := records.get(excess.payment_id):
            record.excess.append(excess)


_BY_TABLE = {
    table: ByIds(select(table).order_by(*table.primary_key.columns), table.c.payment_id)
    for table in (tables.payment, tables.channel_order, tables.payment_outcome, tables.excess_payment)
}


def _rows(connection: Connection, table: Table, ids: Sequence[int]) -> list[Any]:
    """The rows of these payments in the order of the table's key."""
    return _BY_TABLE[table].fetch(connection, ids)
