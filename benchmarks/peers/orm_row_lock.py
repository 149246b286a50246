"""What most teams write: SQLAlchemy's ORM, one transaction a notification, the order's row locked while it is judged.

On PostgreSQL by SELECT ... FOR UPDATE; on SQLite, which has no row locks, by BEGIN IMMEDIATE. A pool of connections, a
few threads, objects that are read, changed and flushed. The order's state lies in its row and is updated.
"""

from __future__ import annotations

import sys

from sqlalchemy import BigInteger, String, func, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks.peers.common import MANY, Options, Result, Success, engine_on, expect, lot, main, pay, successes
from paycore.bench.databases import Database

OPEN, PAID = "OPEN", "PAID"


class Base(DeclarativeBase):
    """The mapped classes."""


class PeerOrder(Base):
    """An order and its state."""

    __tablename__ = "peer_order"

    payment_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    amount_minor: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    status: Mapped[str] = mapped_column(String(8))
    channel_trade_no: Mapped[str] = mapped_column(String(64))
    paid_at_ms: Mapped[int | None] = mapped_column(BigInteger)


def handle(session: Session, word: Success) -> str:
    """Judge one notification; return what it is."""
    with session.begin():
        order = session.get(PeerOrder, word.payment_id, with_for_update=True)
        if order is None:
            return "UNKNOWN"
        if order.status == PAID:
            return "REPLAYED" if order.channel_trade_no == word.channel_trade_no else "DUPLICATE"
        if (order.amount_minor, order.currency) != (word.amount_minor, word.currency):
            return "MISMATCH"
        order.status = PAID
        order.channel_trade_no = word.channel_trade_no
        order.paid_at_ms = word.paid_at_ms
        return "ACCEPTED"


def measure(options: Options, database: Database) -> Result:
    """Pay all orders."""
    words = successes(lot(options.size))
    with engine_on(database, options.threads) as engine:
        Base.metadata.create_all(engine)
        rows = [
            {
                "payment_id": word.payment_id,
                "amount_minor": word.amount_minor,
                "currency": word.currency,
                "status": OPEN,
                "channel_trade_no": "",
                "paid_at_ms": None,
            }
            for word in words
        ]
        with engine.begin() as connection:
            for start in range(0, len(rows), MANY):
                connection.execute(insert(PeerOrder), rows[start : start + MANY])
        database.settle()
        sessions = sessionmaker(engine)

        def accept(word: Success) -> None:
            with sessions() as session:
                outcome = handle(session, word)
            assert outcome == "ACCEPTED", outcome

        timed = pay(options.threads, words, accept)
        with engine.connect() as connection:
            paid = connection.scalar(select(func.count()).select_from(PeerOrder).where(PeerOrder.status == PAID))
    expect("orders that are PAID", paid or 0, options.size)
    meaning = f"ORM, a transaction each with the order's row locked, {options.threads} at a time"
    return timed.result("ORM with row lock", meaning, options.size, database.facts())


if __name__ == "__main__":
    sys.exit(main(measure))
