"""The bank's books on disk: one SQLite file, written through before anything is answered.

The file is held under an exclusive lock while it is open, so that two banks cannot keep the same books; the lock
ends with the process, however it ends. One thread at a time uses a ``Disk``.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from paycore.simbank.books import Capture, Notice, Order, OrderState, Refund, RefundState
from paycore.simbank.faults import Fault, FaultBox, Planted

APPLICATION_ID = 0x53424E4B
SCHEMA_VERSION = 1
DUE_AT_ONCE = 256
"""How many due notifications are looked at together: after an outage there may be very many."""

_SCHEMA = """
CREATE TABLE book_order (
    bank TEXT NOT NULL, order_no TEXT NOT NULL, amount_minor INTEGER NOT NULL, currency TEXT NOT NULL,
    subject TEXT NOT NULL, return_url TEXT NOT NULL, method TEXT NOT NULL, expire_at_ms INTEGER NOT NULL,
    created_at_ms INTEGER NOT NULL, state TEXT NOT NULL, code TEXT NOT NULL,
    settle_at_ms INTEGER, settle_succeeds INTEGER,
    PRIMARY KEY (bank, order_no)) STRICT, WITHOUT ROWID;
CREATE INDEX order_to_settle ON book_order (settle_at_ms) WHERE settle_at_ms IS NOT NULL;
CREATE TABLE capture (
    trade_no TEXT NOT NULL UNIQUE, bank TEXT NOT NULL, order_no TEXT NOT NULL,
    amount_minor INTEGER NOT NULL, currency TEXT NOT NULL, paid_at_ms INTEGER NOT NULL) STRICT;
CREATE INDEX capture_of_order ON capture (bank, order_no);
CREATE TABLE refund (
    bank TEXT NOT NULL, refund_no TEXT NOT NULL, order_no TEXT NOT NULL, trade_no TEXT NOT NULL,
    amount_minor INTEGER NOT NULL, currency TEXT NOT NULL, created_at_ms INTEGER NOT NULL,
    state TEXT NOT NULL, code TEXT NOT NULL, settle_at_ms INTEGER, settle_succeeds INTEGER,
    PRIMARY KEY (bank, refund_no)) STRICT, WITHOUT ROWID;
CREATE INDEX refund_of_order ON refund (bank, order_no);
CREATE INDEX refund_to_settle ON refund (settle_at_ms) WHERE settle_at_ms IS NOT NULL;
CREATE TABLE notification (
    seq INTEGER PRIMARY KEY, bank TEXT NOT NULL, order_no TEXT NOT NULL, result TEXT NOT NULL,
    trade_no TEXT NOT NULL, amount_minor INTEGER NOT NULL, currency TEXT NOT NULL, paid_at_ms INTEGER,
    copies INTEGER NOT NULL, due_at_ms INTEGER, held INTEGER NOT NULL,
    sends INTEGER NOT NULL DEFAULT 0, acks INTEGER NOT NULL DEFAULT 0, rung INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE INDEX notification_of_order ON notification (bank, order_no);
CREATE INDEX notification_due ON notification (due_at_ms) WHERE due_at_ms IS NOT NULL AND held = 0;
CREATE TABLE hold (bank TEXT PRIMARY KEY) STRICT;
CREATE TABLE planted_fault (
    planted_id INTEGER PRIMARY KEY, bank TEXT NOT NULL, order_no TEXT, subject TEXT, name TEXT NOT NULL,
    value TEXT NOT NULL, times_left INTEGER) STRICT;
CREATE INDEX fault_of_order ON planted_fault (bank, order_no);
CREATE INDEX fault_of_subject ON planted_fault (bank, subject);
"""


class DiskError(Exception):
    """The books cannot be opened. The message is one line that says why."""


class Notification(NamedTuple):
    """One notification on record. rung: the next step of the re-send ladder; due_at_ms None: not sent by itself."""

    seq: int
    bank: str
    order_no: str
    result: str
    trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int | None
    copies: int
    due_at_ms: int | None
    held: int
    sends: int
    acks: int
    rung: int

    @property
    def notification_id(self) -> str:
        """The number under which the merchant and the driver know it."""
        return f"N{self.seq:08d}"


class Disk:
    """The tables, row by row. Callers group writes in ``transaction()``; a write outside of one is a bug."""

    def __init__(self, path: Path) -> None:
        """Open or create the books. Raises DiskError."""
        try:
            self._connection = sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False)
            with contextlib.ExitStack() as undo:
                undo.callback(self._connection.close)
                self._prepare(path)
                undo.pop_all()
        except sqlite3.Error as error:
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            why = "they are in use by another process" if busy else str(error)
            raise DiskError(f"{path}: the bank's books cannot be opened: {why}") from error

    def _prepare(self, path: Path) -> None:
        run = self._connection.execute
        run("PRAGMA locking_mode = EXCLUSIVE")
        run("PRAGMA synchronous = FULL")
        (mode,) = run("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise DiskError(f"{path}: the bank's books need a file system that can do WAL")
        with self.transaction():
            application_id, version = run("PRAGMA application_id").fetchone() + run("PRAGMA user_version").fetchone()
            (tables,) = run("SELECT count(*) FROM sqlite_schema").fetchone()
            if tables == 0:
                self._create()
            elif (application_id, version) != (APPLICATION_ID, SCHEMA_VERSION):
                raise DiskError(f"{path}: not the books of a simulated bank of this version; name another file")

    def _create(self) -> None:
        for statement in _SCHEMA.split(";"):
            self._connection.execute(statement)
        self._connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def close(self) -> None:
        """Close the file. What was committed stays."""
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit what is written inside, durably, or none of it."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    # Orders and captures

    def order(self, bank: str, order_no: str) -> Order | None:
        """Return one order."""
        row = self._connection.execute(
            "SELECT * FROM book_order WHERE bank = ? AND order_no = ?", (bank, order_no)
        ).fetchone()
        return _order(row) if row else None

    def orders(self, bank: str) -> list[Order]:
        """Return all orders of a bank in the order in which they were made."""
        rows = self._connection.execute(
            "SELECT * FROM book_order WHERE bank = ? ORDER BY created_at_ms, order_no", (bank,)
        )
        return [_order(row) for row in rows]

    def orders_after(self, bank: str, after: str, limit: int) -> list[Order]:
        """Return so many orders of a bank that follow a number, in the order of their numbers."""
        rows = self._connection.execute(
            "SELECT * FROM book_order WHERE bank = ? AND order_no > ? ORDER BY order_no LIMIT ?", (bank, after, limit)
        )
        return [_order(row) for row in rows]

    def put_order(self, order: Order) -> None:
        """Write an order, new or moved on."""
        self._connection.execute("REPLACE INTO book_order VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)", order)

    def captures(self, bank: str, order_no: str) -> list[Capture]:
        """Return the captures of an order, oldest first."""
        rows = self._connection.execute(
            "SELECT * FROM capture WHERE bank = ? AND order_no = ? ORDER BY rowid", (bank, order_no)
        )
        return [Capture(*row) for row in rows]

    def add_capture(self, order: Order, paid_at_ms: int) -> Capture:
        """Write a capture of the order's amount, under the next trade number."""
        (last,) = self._connection.execute("SELECT coalesce(max(rowid), 0) FROM capture").fetchone()
        trade_no = f"{order.bank.upper()}-{last + 1:012d}"
        capture = Capture(trade_no, order.bank, order.order_no, order.amount_minor, order.currency, paid_at_ms)
        self._connection.execute("INSERT INTO capture VALUES (?,?,?,?,?,?)", capture)
        return capture

    # Refunds

    def refund(self, bank: str, refund_no: str) -> Refund | None:
        """Return one refund."""
        row = self._connection.execute(
            "SELECT * FROM refund WHERE bank = ? AND refund_no = ?", (bank, refund_no)
        ).fetchone()
        return _refund(row) if row else None

    def refunds(self, bank: str, order_no: str) -> list[Refund]:
        """Return the refunds of an order, oldest first."""
        rows = self._connection.execute(
            "SELECT * FROM refund WHERE bank = ? AND order_no = ? ORDER BY created_at_ms, refund_no", (bank, order_no)
        )
        return [_refund(row) for row in rows]

    def put_refund(self, refund: Refund) -> None:
        """Write a refund, new or moved on."""
        self._connection.execute("REPLACE INTO refund VALUES (?,?,?,?,?,?,?,?,?,?,?)", refund)

    # What is due

    def orders_to_settle(self, now_ms: int) -> list[Order]:
        """Return the accepted charges whose time has come."""
        rows = self._connection.execute(
            "SELECT * FROM book_order WHERE settle_at_ms <= ? ORDER BY settle_at_ms, order_no", (now_ms,)
        )
        return [_order(row) for row in rows]

    def refunds_to_settle(self, now_ms: int) -> list[Refund]:
        """Return the accepted refunds whose time has come."""
        rows = self._connection.execute(
            "SELECT * FROM refund WHERE settle_at_ms <= ? ORDER BY settle_at_ms, refund_no", (now_ms,)
        )
        return [_refund(row) for row in rows]

    def notifications_due(self, now_ms: int) -> list[Notification]:
        """Return notifications whose time has come, in the order in which they are to be sent: a portion of them."""
        rows = self._connection.execute(
            "SELECT * FROM notification WHERE held = 0 AND due_at_ms <= ? ORDER BY due_at_ms, seq LIMIT ?",
            (now_ms, DUE_AT_ONCE),
        )
        return [Notification(*row) for row in rows]

    def next_due_ms(self, now_ms: int) -> int | None:
        """Return when something falls due next after now; None when nothing does."""
        (due,) = self._connection.execute(
            """SELECT min(due) FROM (
                SELECT min(settle_at_ms) AS due FROM book_order WHERE settle_at_ms > :now_ms
                UNION ALL SELECT min(settle_at_ms) FROM refund WHERE settle_at_ms > :now_ms
                UNION ALL SELECT min(due_at_ms) FROM notification WHERE due_at_ms > :now_ms AND held = 0)""",
            {"now_ms": now_ms},
        ).fetchone()
        return due if isinstance(due, int) else None

    # Notifications

    def add_notifications(self, bank: str, order_no: str, notices: Iterable[Notice]) -> None:
        """Write notifications in the order given. Those of a bank that is held are held."""
        held = self.is_held(bank)
        for one in notices:
            self._connection.execute(
                "INSERT INTO notification (bank, order_no, result, trade_no, amount_minor, currency, paid_at_ms,"
                " copies, due_at_ms, held) VALUES (?,?,?,?,?,?,?,?,?,?)",
                (bank, order_no, *one[:-1], int(held or one.held)),
            )

    def notification(self, seq: int) -> Notification | None:
        """Return one notification."""
        row = self._connection.execute("SELECT * FROM notification WHERE seq = ?", (seq,)).fetchone()
        return Notification(*row) if row else None

    def notifications(self, bank: str, order_no: str) -> list[Notification]:
        """Return the notifications of an order, oldest first."""
        rows = self._connection.execute(
            "SELECT * FROM notification WHERE bank = ? AND order_no = ? ORDER BY seq", (bank, order_no)
        )
        return [Notification(*row) for row in rows]

    def held_notifications(self, bank: str) -> list[Notification]:
        """Return the notifications of a bank that wait for their release, oldest first."""
        rows = self._connection.execute("SELECT * FROM notification WHERE bank = ? AND held = 1 ORDER BY seq", (bank,))
        return [Notification(*row) for row in rows]

    def put_notification(self, one: Notification) -> None:
        """Write what moved on in a notification."""
        self._connection.execute(
            "UPDATE notification SET copies = ?, due_at_ms = ?, held = ?, sends = ?, acks = ?, rung = ? WHERE seq = ?",
            (one.copies, one.due_at_ms, one.held, one.sends, one.acks, one.rung, one.seq),
        )

    def is_held(self, bank: str) -> bool:
        """Whether a bank's notifications wait for their release."""
        return self._connection.execute("SELECT 1 FROM hold WHERE bank = ?", (bank,)).fetchone() is not None

    def hold(self, bank: str) -> None:
        """Keep back a bank's notifications: those to come and those that wait for their next sending."""
        self._connection.execute("INSERT OR IGNORE INTO hold VALUES (?)", (bank,))
        self._connection.execute("UPDATE notification SET held = 1 WHERE bank = ? AND due_at_ms IS NOT NULL", (bank,))

    def end_hold(self, bank: str) -> None:
        """Hold no further notifications of a bank. Those that are held stay so."""
        self._connection.execute("DELETE FROM hold WHERE bank = ?", (bank,))

    # Faults

    def fault_box(self, bank: str, order_no: str, subject: str | None, once: Iterable[Fault] = ()) -> FaultBox:
        """Return the faults that hold for an order. Hand it to ``count_down`` in the same transaction."""
        rows = self._connection.execute(
            "SELECT * FROM planted_fault WHERE bank = ? AND order_no = ?"
            " UNION ALL SELECT * FROM planted_fault WHERE bank = ? AND subject = ?"
            " UNION ALL SELECT * FROM planted_fault WHERE bank = ? AND order_no IS NULL AND subject IS NULL",
            (bank, order_no, bank, subject, bank),
        )
        return FaultBox([_planted(row) for row in rows], order_no, subject, once)

    def planted(self, bank: str) -> list[Planted]:
        """Return a bank's planted faults, oldest first."""
        rows = self._connection.execute("SELECT * FROM planted_fault WHERE bank = ? ORDER BY planted_id", (bank,))
        return [_planted(row) for row in rows]

    def count_down(self, box: FaultBox) -> None:
        """Take one occasion off each fault that was used."""
        self._connection.executemany(
            "UPDATE planted_fault SET times_left = times_left - 1 WHERE planted_id = ? AND times_left > 0",
            [(one.planted_id,) for one in box.used if one.times_left is not None],
        )

    def plant(self, bank: str, order_no: str | None, subject: str | None, faults: Iterable[Fault]) -> None:
        """Put faults in the place of what was planted for the same match."""
        self._connection.execute(
            "DELETE FROM planted_fault WHERE bank = ? AND order_no IS ? AND subject IS ?", (bank, order_no, subject)
        )
        self._connection.executemany(
            "INSERT INTO planted_fault (bank, order_no, subject, name, value, times_left) VALUES (?,?,?,?,?,?)",
            [(bank, order_no, subject, one.name, json.dumps(one.value), one.times) for one in faults],
        )


def _order(row: tuple[object, ...]) -> Order:
    order = Order(*row)  # type: ignore[arg-type]  # the columns are declared STRICT, in the record's order
    return order._replace(state=OrderState(order.state))


def _refund(row: tuple[object, ...]) -> Refund:
    refund = Refund(*row)  # type: ignore[arg-type]  # the columns are declared STRICT, in the record's order
    return refund._replace(state=RefundState(refund.state))


def _planted(row: tuple[object, ...]) -> Planted:
    planted = Planted(*row)  # type: ignore[arg-type]  # the columns are declared STRICT, in the record's order
    return planted._replace(value=json.loads(str(planted.value)))
