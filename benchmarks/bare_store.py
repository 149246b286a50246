"""The store's own limit: the same outcome rows into the same table with group commit, alone in a process.

``python -m benchmarks.bare_store DATABASE ROWS GROUP`` inserts the outcomes of the first ROWS payments of a prepared
database, GROUP in one durable transaction, and prints {"seconds": ...} for all of them. No index, no decision, no gRPC.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.dialects import sqlite

from benchmarks.notify_cases import OPEN_ATTEMPT, trade_no
from paycore.domain.verdicts import CaptureSource, PaymentState
from paycore.store import tables
from paycore.store.engine import parse_database_url
from paycore.store.rows import OutcomeRow, PaymentRow


def insert_sql() -> str:
    """The insert that does nothing where a payment has an outcome."""
    columns: dict[str, Any] = {column.name: bindparam(column.name) for column in tables.payment_outcome.columns}
    statement = sqlite.insert(tables.payment_outcome).on_conflict_do_nothing(index_elements=["payment_id"])
    return str(statement.values(columns).compile(dialect=sqlite.dialect(paramstyle="qmark")))


def run(path: Path, rows: int, group: int) -> float:
    """Insert, and return the seconds that it took. Raises RuntimeError unless every row went in."""
    engine = parse_database_url(f"sqlite:///{path}").engine(writes=True)
    with engine.connect() as connection:
        with connection.begin():
            payments = connection.execute(select(tables.payment).order_by(tables.payment.c.payment_id).limit(rows))
            outcomes = [outcome(PaymentRow(*payment)) for payment in payments]
        driver = connection.connection.driver_connection
        assert driver is not None
        sql, inserted = insert_sql(), 0
        started_ns = time.perf_counter_ns()
        for start in range(0, len(outcomes), group):
            driver.execute("BEGIN IMMEDIATE")
            inserted += driver.executemany(sql, outcomes[start : start + group]).rowcount
            driver.execute("COMMIT")
        seconds = (time.perf_counter_ns() - started_ns) / 1e9
    engine.dispose()
    if inserted != rows:
        raise RuntimeError(f"{inserted} of {rows} outcomes went into {path}")
    return seconds


def outcome(payment: PaymentRow) -> OutcomeRow:
    """The outcome that the server writes for a payment's first notification."""
    at_ms = payment.recorded_at_ms + 1_000
    return OutcomeRow(
        payment_id=payment.payment_id,
        state=PaymentState.PAID,
        attempt=OPEN_ATTEMPT,
        channel_trade_no=trade_no(payment.payment_id),
        amount_minor=payment.amount_minor,
        currency="CNY",
        paid_at_ms=at_ms,
        received_at_ms=at_ms,
        source=CaptureSource.NOTIFICATION,
        paid_at_untrusted=0,
        close_reason=0,
        recorded_at_ms=at_ms,
        writer_no=1,
        group_no=1,
    )


if __name__ == "__main__":
    database, row_count, group_size = sys.argv[1:]
    print(json.dumps({"seconds": run(Path(database), int(row_count), int(group_size))}))
