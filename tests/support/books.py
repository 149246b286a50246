"""The books of a database, by SQL over all of it: payments put there in bulk, and what is wrong with the money."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

from paycore.bench.payments import Lot, id_sql, statements
from paycore.domain.verdicts import PaymentState
from paycore.store.rows import Stamp
from tests.support.databases import is_postgresql
from tests.support.postgres import connected

_SQLITE_SERIES = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT i, {id}"
_POSTGRESQL_SERIES = "SELECT i, {id} AS payment_id FROM generate_series(0::bigint, {last}::bigint) AS n (i)"
_BULK_WRITER = 0
"""No server ever draws this writer number."""


def put_lot(url: str, lot: Lot) -> list[int]:
    """Write a lot of payments as Pay leaves them, beside whoever uses the database; return their ids, ascending."""
    series = _POSTGRESQL_SERIES if is_postgresql(url) else f"{_SQLITE_SERIES} AS payment_id FROM n"
    source = series.format(last=lot.size - 1, id=id_sql(lot))
    run(url, *statements(lot, source, Stamp(lot.first_ms, _BULK_WRITER, 1)))
    return list(lot.ids())


def run(url: str, *statements: str) -> None:
    """Run statements in one transaction."""
    if is_postgresql(url):
        with connected(url, autocommit=False) as connection:
            for statement in statements:
                connection.execute(statement.encode())
        return
    with closing(_sqlite(url)) as file:
        file.execute("BEGIN IMMEDIATE")
        for statement in statements:
            file.execute(statement)
        file.execute("COMMIT")


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    """Run a query."""
    if is_postgresql(url):
        with connected(url) as connection:
            return connection.execute(query.encode()).fetchall()
    with closing(_sqlite(url)) as file:
        return file.execute(query).fetchall()


def _sqlite(url: str) -> sqlite3.Connection:
    return sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=60)


def someone_waits(url: str) -> bool:
    """Whether a transaction waits for another one's lock. Only on PostgreSQL."""
    waiting = "wait_event_type = 'Lock' AND datname = current_database()"
    return bool(rows(url, f"SELECT 1 FROM pg_stat_activity WHERE {waiting}"))


_SAME = "{0}.payment_id = {1}.payment_id AND {0}.attempt = {1}.attempt AND {0}.channel_trade_no = {1}.channel_trade_no"

_WRONG = {
    "a payment with more than one outcome": """
        SELECT payment_id, count(*) FROM payment_outcome GROUP BY payment_id HAVING count(*) <> 1""",
    "a capture both kept and excess": f"""
        SELECT e.* FROM excess_payment e JOIN payment_outcome o ON {_SAME.format("e", "o")}
        WHERE o.state = {PaymentState.PAID:d}""",
    "excess under an outcome without exactly one refund of what was captured": f"""
        SELECT e.* FROM excess_payment e JOIN payment_outcome o ON e.payment_id = o.payment_id
        WHERE (SELECT count(*) FROM refund r WHERE {_SAME.format("r", "e")}) <> 1
           OR NOT EXISTS (SELECT 1 FROM refund r WHERE {_SAME.format("r", "e")}
                          AND r.amount_minor = e.amount_minor AND r.currency = e.currency)""",
    "a refund without an outcome or of what is no excess": f"""
        SELECT r.* FROM refund r
        WHERE NOT EXISTS (SELECT 1 FROM payment_outcome o WHERE o.payment_id = r.payment_id)
           OR NOT EXISTS (SELECT 1 FROM excess_payment e WHERE {_SAME.format("r", "e")})""",
    "a refund without exactly one first try": """
        SELECT r.payment_id, r.refund_no FROM refund r WHERE (SELECT count(*) FROM refund_try t
        WHERE t.payment_id = r.payment_id AND t.refund_no = r.refund_no AND t.seq = 1) <> 1""",
}


def check_books(url: str) -> None:
    """Hold R1 and R2 over the whole database, capture by capture."""
    wrong = {what: rows(url, query)[:5] for what, query in _WRONG.items()}
    assert not {what: found for what, found in wrong.items() if found}


def not_settled_once(url: str, first_id: int, last_id: int) -> list[tuple[Any, ...]]:
    """Attempts of these payments whose money is not settled exactly once, kept or refunded: (payment, attempt, count).

    For payments each attempt of which was told to be paid, by one capture.
    """
    return rows(
        url,
        f"""
        SELECT * FROM (
          SELECT a.payment_id, a.attempt,
            (SELECT count(*) FROM payment_outcome o WHERE o.payment_id = a.payment_id AND o.attempt = a.attempt)
            + (SELECT count(*) FROM refund r WHERE r.payment_id = a.payment_id AND r.attempt = a.attempt) AS settled
          FROM channel_order a WHERE a.payment_id BETWEEN {first_id} AND {last_id}
        ) AS of_attempt WHERE settled <> 1""",
    )


def counts(url: str, first_id: int, last_id: int) -> dict[str, int]:
    """How many rows about these payments the tables of facts hold."""
    tables = ("payment_outcome", "excess_payment", "refund", "refund_try", "quarantine")
    where = f"WHERE payment_id BETWEEN {first_id} AND {last_id}"
    return {table: int(rows(url, f"SELECT count(*) FROM {table} {where}")[0][0]) for table in tables}
