"""What the index holds of payments, read in bulk: plain tuples as the driver gives them, no object a row of ours."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, select, true

from paycore.store import tables
from paycore.store.by_ids import ByIds

_PAYMENT, _ATTEMPT = tables.payment.c, tables.channel_order.c
_OUTCOME, _EXCESS = tables.payment_outcome.c, tables.excess_payment.c


class IndexColumns(NamedTuple):
    """Payments for the index, each list ascending by payment_id.

    payments: (payment_id, amount_minor, currency, expire_at_ms, outcome's state or None, kept attempt or None).
    attempts: (payment_id, attempt, channel, account). captures, of excess: (payment_id, attempt).
    """

    payments: Sequence[tuple[int, int, str, int, int | None, int | None]]
    attempts: Sequence[tuple[int, int, str, str]]
    captures: Sequence[tuple[int, int]]


def _payments(condition: ColumnElement[bool]) -> Select[Any]:
    columns = (_PAYMENT.payment_id, _PAYMENT.amount_minor, _PAYMENT.currency, _PAYMENT.expire_at_ms)
    outcome = tables.payment.outerjoin(tables.payment_outcome, _OUTCOME.payment_id == _PAYMENT.payment_id)
    return select(*columns, _OUTCOME.state, _OUTCOME.attempt).select_from(outcome).where(condition)


def _attempts(condition: ColumnElement[bool]) -> Select[Any]:
    columns = (_ATTEMPT.payment_id, _ATTEMPT.attempt, _ATTEMPT.channel, _ATTEMPT.account)
    return select(*columns).where(condition).order_by(_ATTEMPT.payment_id, _ATTEMPT.attempt)


def _captures(condition: ColumnElement[bool]) -> Select[Any]:
    return select(_EXCESS.payment_id, _EXCESS.attempt).where(condition).order_by(_EXCESS.payment_id, _EXCESS.attempt)


def _within(column: Any) -> ColumnElement[bool]:
    return and_(column >= bindparam("first"), column <= bindparam("last"))


# Newest first, so that a limit cuts off the oldest.
_NEWEST = _payments(_PAYMENT.payment_id < bindparam("before")).order_by(_PAYMENT.payment_id.desc())
_ATTEMPTS_WITHIN = _attempts(_within(_ATTEMPT.payment_id))
_CAPTURES_WITHIN = _captures(_within(_EXCESS.payment_id))
_PAYMENTS_AMONG = ByIds(_payments(true()).order_by(_PAYMENT.payment_id), _PAYMENT.payment_id)
_ATTEMPTS_AMONG = ByIds(_attempts(true()), _ATTEMPT.payment_id)
_CAPTURES_AMONG = ByIds(_captures(true()), _EXCESS.payment_id)


def columns_before(connection: Connection, before: int, limit: int) -> IndexColumns:
    """Read the newest payments with an id below ``before``, at most ``limit``."""
    payments = _fetch(connection, _NEWEST.limit(limit), {"before": before})
    if not payments:
        return IndexColumns((), (), ())
    payments.reverse()
    ends = {"first": payments[0][0], "last": payments[-1][0]}
    return IndexColumns(
        payments, _fetch(connection, _ATTEMPTS_WITHIN, ends), _fetch(connection, _CAPTURES_WITHIN, ends)
    )


def columns_of(connection: Connection, payment_ids: Sequence[int]) -> IndexColumns:
    """Read these payments, given ascending; those that do not exist are left out."""
    return IndexColumns(
        _PAYMENTS_AMONG.fetch(connection, payment_ids),
        _ATTEMPTS_AMONG.fetch(connection, payment_ids),
        _CAPTURES_AMONG.fetch(connection, payment_ids),
    )


def _fetch(connection: Connection, statement: Select[Any], parameters: dict[str, Any]) -> list[Any]:
    # Below SQLAlchemy's rows: integers and texts need no conversion, and a million rows need no object each.
    cursor = connection.execute(statement, parameters).cursor
    assert cursor is not None, "a SELECT has a cursor until it is closed"
    rows = list(cursor.fetchall())
    cursor.close()
    return rows
