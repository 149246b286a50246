"""Looks into a database from outside, as its own process would: what is in it, and payments put there beforehand."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from paycore.domain.ids import PaymentIds, format_channel_order_no
from paycore.domain.verdicts import AttemptState, PayMethod
from paycore.store import tables
from paycore.store.rows import ChannelOrderRow, PaymentRow, Stamp
from paycore.store.schema import open_store

HOUSEKEEPING = tables.WRITTEN_BY_JOBS | {"alembic_version", "sqlite_sequence"}

AMOUNT_MINOR = 1_999
CURRENCY = "CNY"


def now_ms() -> int:
    """The machine's time."""
    return time.time_ns() // 1_000_000


class WallClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        return now_ms()


def contents(db_path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table of facts."""
    with closing(sqlite3.connect(f"{db_path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: sorted(connection.execute(f'SELECT * FROM "{name}"').fetchall(), key=repr)
            for name in names
            if name not in HOUSEKEEPING
        }


def select(db_path: Path, statement: str, *values: object) -> list[tuple[Any, ...]]:
    """Read rows."""
    with closing(sqlite3.connect(f"{db_path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        return connection.execute(statement, values).fetchall()


def put_payments(
    url: str, count: int, *, channel: str = "simbank", account: str = "bank_a", validity_ms: int = 3_600_000
) -> list[str]:
    """Write payments with one open attempt each, as Pay leaves them; return their channel order numbers."""
    store = open_store(url)
    try:
        at_ms = now_ms()
        stamp = Stamp(at_ms, store.open_writer(at_ms), 1)
        ids = PaymentIds(WallClock(), node=1023)
        with store.write(stamp) as transaction:
            numbers = []
            for index in range(count):
                payment_id, order_no = ids.draw(), f"put-{index}"
                transaction.insert_payment(
                    PaymentRow(
                        payment_id,
                        "shop",
                        order_no,
                        AMOUNT_MINOR,
                        CURRENCY,
                        "Tea",
                        "",
                        "-",
                        at_ms + validity_ms,
                        *stamp,
                    )
                )
                transaction.insert_merchant_order("shop", order_no, payment_id)
                transaction.insert_channel_order(_attempt(payment_id, channel, account, at_ms + validity_ms, stamp))
                numbers.append(format_channel_order_no(payment_id, 1))
        return numbers
    finally:
        store.dispose()


def _attempt(payment_id: int, channel: str, account: str, expire_at_ms: int, stamp: Stamp) -> ChannelOrderRow:
    return ChannelOrderRow(
        payment_id,
        1,
        channel,
        account,
        PayMethod.REDIRECT,
        expire_at_ms,
        AttemptState.OPEN,
        stamp.recorded_at_ms,
        "https://bank.example/pay",
        "",
        "",
        None,
        None,
        0,
        "",
        *stamp,
    )
