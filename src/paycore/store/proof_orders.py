"""Payments beside the merchant orders that name them: the part of the audit that compares tables with different keys.

Where one machine holds both, it joins them, which is quick. A sharded engine keeps the two on different machines and
joins them by nothing. There the rows of one side are read, and the other side is asked for them by its key; the rows go
along as columns, which can be joined with one table. The database counts those that agree; only where some do not are
rows compared here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, text

from paycore.domain.audit import AuditKind, Violation


class Naming(NamedTuple):
    """That a payment is of a merchant's order: a row of ``payment`` says so, or one of ``merchant_order``."""

    payment_id: int
    merchant_id: str
    merchant_order_no: str

    @property
    def order(self) -> tuple[str, str]:
        """The merchant order's key."""
        return self.merchant_id, self.merchant_order_no


class OrderKey(NamedTuple):
    """A merchant order's key; the empty one lies before all."""

    merchant_id: str = ""
    merchant_order_no: str = ""


PAYMENTS = """
SELECT payment_id, merchant_id, merchant_order_no FROM payment WHERE payment_id > :after AND payment_id <= :last
"""

# Merchant orders have another key and are read in its order, so many at a time.
ORDERS = """
SELECT payment_id, merchant_id, merchant_order_no FROM merchant_order
WHERE (merchant_id, merchant_order_no) > (:merchant_id, :merchant_order_no)
ORDER BY merchant_id, merchant_order_no LIMIT :rows
"""

# A scalar subquery is asked row by row, through its index, whatever a planner thinks of the whole table.
UNNAMED_PAYMENTS = """
SELECT p.payment_id, p.merchant_id, p.merchant_order_no FROM payment AS p
WHERE p.payment_id > :after AND p.payment_id <= :last
  AND coalesce((SELECT m.payment_id FROM merchant_order m WHERE m.merchant_id = p.merchant_id
    AND m.merchant_order_no = p.merchant_order_no), 0) <> p.payment_id
  AND NOT EXISTS (SELECT 1 FROM merchant_order m WHERE m.merchant_id = p.merchant_id
    AND m.merchant_order_no = p.merchant_order_no AND NOT EXISTS (SELECT 1 FROM payment n
      WHERE n.payment_id = m.payment_id AND n.merchant_id = m.merchant_id
        AND n.merchant_order_no = m.merchant_order_no))
"""

WRONG_ORDERS = f"""
SELECT m.payment_id, m.merchant_id, m.merchant_order_no FROM ({ORDERS}) AS m
WHERE coalesce((SELECT 1 FROM payment n WHERE n.payment_id = m.payment_id AND n.merchant_id = m.merchant_id
  AND n.merchant_order_no = m.merchant_order_no), 0) = 0
"""  # noqa: S608 - no input

LAST_ORDER = """
SELECT merchant_id, merchant_order_no FROM merchant_order
WHERE (merchant_id, merchant_order_no) > (:merchant_id, :merchant_order_no)
ORDER BY merchant_id, merchant_order_no LIMIT 1 OFFSET :offset
"""

_TOLD = """unnest(CAST(:payment_ids AS bigint[]), CAST(:merchant_ids AS text[]), CAST(:order_nos AS text[]))
  AS told (payment_id, merchant_id, merchant_order_no)"""
"""Rows of the other side as a table."""

_ORDERS_OF_PAYMENTS = f"""
FROM {_TOLD} JOIN merchant_order AS m
  ON m.merchant_id = told.merchant_id AND m.merchant_order_no = told.merchant_order_no
"""

_PAYMENTS_OF_ORDERS = f"FROM {_TOLD} JOIN payment AS m ON m.payment_id = told.payment_id"

_AGREES = """
WHERE m.payment_id = told.payment_id AND m.merchant_id = told.merchant_id
  AND m.merchant_order_no = told.merchant_order_no
"""

_CITUS = text("SELECT count(*) FROM pg_extension WHERE extname = 'citus'")


def is_sharded(connection: Connection) -> bool:
    """Whether the tables may lie on different machines."""
    return connection.dialect.name == "postgresql" and bool(connection.execute(_CITUS).scalar_one())


def prove_payments(connection: Connection, after: int, last: int) -> list[Violation]:
    """Find the payments of a range that their merchant order does not name.

    An order that names no payment of its own is a violation of its own, and not told of here.
    """
    if is_sharded(connection):
        unnamed = _look_for_orders(connection, _read(connection, PAYMENTS, after=after, last=last))
    else:
        unnamed = _read(connection, UNNAMED_PAYMENTS, after=after, last=last)
    return [_violation(AuditKind.PAYMENT_WITHOUT_ORDER, one) for one in unnamed]


def prove_orders(connection: Connection, after: OrderKey, rows: int) -> tuple[list[Violation], OrderKey | None]:
    """Find those among the merchant orders that follow one that name no payment of theirs; and the last of them.

    None when there are no more.
    """
    key = after._asdict()
    if is_sharded(connection):
        orders = _read(connection, ORDERS, **key, rows=rows)
        wrong = _look_for_payments(connection, orders)
        last = OrderKey(*orders[-1].order) if len(orders) == rows else None
    else:
        wrong = _read(connection, WRONG_ORDERS, **key, rows=rows)
        found = connection.execute(text(LAST_ORDER), {**key, "offset": rows - 1}).one_or_none()
        last = None if found is None else OrderKey(*found)
    return [_violation(AuditKind.ORDER_NAMES_NO_PAYMENT, one) for one in wrong], last


def _look_for_orders(connection: Connection, payments: Sequence[Naming]) -> list[Naming]:
    """Those of these payments that no order of theirs names, but for those whose order names no sound payment."""
    if _count(connection, _ORDERS_OF_PAYMENTS, payments) == len(payments):
        return []
    orders = {one.order: one for one in _find(connection, _ORDERS_OF_PAYMENTS, payments)}
    unnamed = [one for one in payments if orders.get(one.order) != one]
    others = [orders[one.order] for one in unnamed if one.order in orders]
    wrong = set(_look_for_payments(connection, others))
    return [one for one in unnamed if orders.get(one.order) not in wrong]


def _look_for_payments(connection: Connection, orders: Sequence[Naming]) -> list[Naming]:
    """Those of these orders that name no payment of theirs."""
    if _count(connection, _PAYMENTS_OF_ORDERS, orders) == len(orders):
        return []
    sound = set(_find(connection, _PAYMENTS_OF_ORDERS, orders))
    return [one for one in orders if one not in sound]


def _violation(kind: AuditKind, one: Naming) -> Violation:
    return Violation(kind, one.payment_id, {"merchant_id": one.merchant_id, "merchant_order_no": one.merchant_order_no})


def _read(connection: Connection, statement: str, **parameters: Any) -> list[Naming]:
    return [Naming(*row) for row in connection.execute(text(statement), parameters)]


def _count(connection: Connection, source: str, told: Sequence[Naming]) -> int:
    """How many rows the other table has as they are told."""
    return int(_ask(connection, f"SELECT count(*) {source} {_AGREES}", told)[0][0]) if told else 0


def _find(connection: Connection, source: str, told: Sequence[Naming]) -> list[Naming]:
    """The rows of the other table under the keys that are told."""
    rows = _ask(connection, f"SELECT m.payment_id, m.merchant_id, m.merchant_order_no {source}", told) if told else ()
    return [Naming(*row) for row in rows]


def _ask(connection: Connection, statement: str, told: Sequence[Naming]) -> Sequence[Any]:
    """Have each row looked up through its index: a planner may rather read the whole index of a middling table."""
    columns = dict(zip(("payment_ids", "merchant_ids", "order_nos"), map(list, zip(*told, strict=True)), strict=True))
    for way in ("hashjoin", "mergejoin"):
        connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
    rows = connection.execute(text(statement), columns).all()
    for way in ("hashjoin", "mergejoin"):
        connection.exec_driver_sql(f"SET LOCAL enable_{way} = on")
    return rows
