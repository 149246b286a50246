"""Payments with all that decides about their captures, by their ids.

Asked for each group that holds more than first words, so the statements are compiled once and the rows go by
SQLAlchemy's own: integers and texts need no conversion.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import ARRAY, BigInteger, BindParameter, Connection, Dialect, Table, any_, bindparam, select

from paycore.store import tables
from paycore.store.rows import ChannelOrderRow, ExcessRow, OutcomeRow, PaymentRecord, PaymentRow

_IDS_A_STATEMENT = (1, 8, 64, 500)
"""How many ids a statement names where there are no arrays; the last of fewer is named again."""

_MOST_IDS = _IDS_A_STATEMENT[-1]


def load_records(connection: Connection, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
    """Read payments with attempts, outcome and excess; those that do not exist are left out."""
    records: dict[int, PaymentRecord] = {}
    ids = sorted(set(payment_ids))
    for start in range(0, len(ids), _MOST_IDS):
        _load_some(connection, ids[start : start + _MOST_IDS], records)
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


def _rows(connection: Connection, table: Table, ids: Sequence[int]) -> Iterator[Any]:
    """The rows of these payments in the order of the table's key."""
    dialect = connection.dialect
    parameters: Any
    if _has_arrays(dialect):
        statement, parameters = _by_array(dialect, table), {"ids": list(ids)}
    else:
        size = next(size for size in _IDS_A_STATEMENT if size >= len(ids))
        statement, parameters = _by_list(dialect, table, size), (*ids, *[ids[-1]] * (size - len(ids)))
    cursor = connection.exec_driver_sql(statement, parameters).cursor
    assert cursor is not None, "a SELECT has a cursor until it is closed"
    found = cursor.fetchall()
    cursor.close()
    return iter(found)


def _has_arrays(dialect: Dialect) -> bool:
    return dialect.name == "postgresql"


@functools.lru_cache(maxsize=64)
def _by_array(dialect: Dialect, table: Table) -> str:
    ids: BindParameter[Any] = bindparam("ids", type_=ARRAY(BigInteger))
    statement = select(table).where(table.c.payment_id == any_(ids)).order_by(*table.primary_key.columns)
    return str(statement.compile(dialect=dialect))


@functools.lru_cache(maxsize=64)
def _by_list(dialect: Dialect, table: Table, size: int) -> str:
    ids: list[BindParameter[Any]] = [bindparam(f"id_{place}") for place in range(size)]
    statement = select(table).where(table.c.payment_id.in_(ids)).order_by(*table.primary_key.columns)
    return str(statement.compile(dialect=dialect))
