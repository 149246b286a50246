"""The schema of facts, once for every database.

Facts are inserted once and never updated or deleted; their primary key is the arbiter between
threads, processes and machines. Only ``channel_order`` and ``refund_try`` (conversations with a channel),
``quarantine`` (arrivals, resolutions), ``task`` and ``sweep_pending`` (what repair comes back to) and the housekeeping
tables (``writer``, ``lease``, ``sweep_mark``, ``quarantine_mark``) change after their insert.

Every key but those of ``merchant_order``, ``quarantine`` and housekeeping starts with payment_id, so that a
sharded engine can distribute by it; for the same reason there are no foreign keys. Each fact says when it was recorded
and by which (writer_no, group_no): the numbers of one writer grow in the order of its commits, with gaps.
Times are milliseconds since the Unix epoch, UTC; amounts are in the currency's minor unit.
"""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    literal_column,
)
from sqlalchemy.dialects import sqlite

METADATA = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

# SQLite makes a key the table's own order only where its type is spelled INTEGER.
_Int64 = BigInteger().with_variant(sqlite.INTEGER(), "sqlite")
_Code = SmallInteger().with_variant(sqlite.INTEGER(), "sqlite")
# Compared and ordered byte by byte, as SQLite does: no version of the system's locales can reorder an index.
_Text = Text().with_variant(Text(collation="C"), "postgresql")


def _stamp() -> list[Column[int]]:
    """When a fact was recorded, and its place in the feed of events."""
    return [
        Column("recorded_at_ms", _Int64, nullable=False),
        Column("writer_no", _Int64, nullable=False),
        Column("group_no", _Int64, nullable=False),
    ]


def _key(name: str) -> Column[int]:
    return Column(name, _Int64, primary_key=True, autoincrement=False)


def _attempt_key() -> Column[int]:
    return Column("attempt", _Code, primary_key=True, autoincrement=False)


def _capture_columns() -> list[Column[int] | Column[str]]:
    """What was captured, when the channel says it was paid, and who told us when."""
    return [
        Column("amount_minor", _Int64, nullable=False),
        Column("currency", _Text, nullable=False),
        Column("paid_at_ms", _Int64),
        Column("received_at_ms", _Int64, nullable=False),
        Column("source", _Code, nullable=False),
    ]


def _table(name: str, *parts: Column[int] | Column[str] | Column[bytes] | CheckConstraint | Index) -> Table:
    # STRICT makes SQLite hold the types: a float or a text never lands in an integer column. A table with a
    # composite key is stored in the order of that key.
    composite = sum(isinstance(part, Column) and part.primary_key for part in parts) > 1
    return Table(name, METADATA, *parts, sqlite_strict=True, sqlite_with_rowid=not composite)


merchant_order = _table(
    "merchant_order",
    Column("merchant_id", _Text, primary_key=True),
    Column("merchant_order_no", _Text, primary_key=True),
    Column("payment_id", _Int64, nullable=False),
    *_stamp(),
)

payment = _table(
    "payment",
    _key("payment_id"),
    Column("merchant_id", _Text, nullable=False),
    Column("merchant_order_no", _Text, nullable=False),
    Column("amount_minor", _Int64, nullable=False),
    Column("currency", _Text, nullable=False),
    Column("subject", _Text, nullable=False),
    Column("return_url", _Text, nullable=False),
    # SHA-256 over the terms that a repeated call must agree with: amount, currency, subject, return_url.
    Column("terms_digest", _Text, nullable=False),
    Column("expire_at_ms", _Int64, nullable=False),
    *_stamp(),
    CheckConstraint("payment_id > 0", name="payment_id"),
    CheckConstraint("amount_minor > 0", name="amount_minor"),
)

channel_order = _table(
    "channel_order",
    _key("payment_id"),
    _attempt_key(),
    Column("channel", _Text, nullable=False),
    Column("account", _Text, nullable=False),
    Column("method", _Code, nullable=False),
    # Stored, and sent to the channel identically each time.
    Column("expire_at_ms", _Int64, nullable=False),
    Column("state", _Code, nullable=False),
    Column("state_at_ms", _Int64, nullable=False),
    # What the user needs to pay: a page's URL or a QR code's text, by method; empty until the channel answered.
    Column("credential", _Text, nullable=False),
    Column("failure_code", _Text, nullable=False),
    Column("failure_message", _Text, nullable=False),
    Column("failed_at_ms", _Int64),
    # Set when a younger attempt took its place: to be queried and closed at the channel.
    Column("superseded_at_ms", _Int64),
    # Whoever talks to the channel about it holds this lease; 0 and empty when nobody does.
    Column("lease_until_ms", _Int64, nullable=False),
    Column("lease_token", _Text, nullable=False),
    *_stamp(),
    CheckConstraint("attempt BETWEEN 1 AND 63", name="attempt"),
    CheckConstraint("state BETWEEN 1 AND 5", name="state"),
)

payment_outcome = _table(
    "payment_outcome",
    _key("payment_id"),
    Column("state", _Code, nullable=False),
    # The kept capture; attempt 0, empty trade number and currency, amount 0 where CLOSED.
    Column("attempt", _Code, nullable=False),
    Column("channel_trade_no", _Text, nullable=False),
    *_capture_columns(),
    Column("paid_at_untrusted", _Code, nullable=False),
    Column("close_reason", _Code, nullable=False),
    *_stamp(),
    CheckConstraint(
        "(state = 2 AND attempt BETWEEN 1 AND 63 AND amount_minor > 0 AND close_reason = 0)"
        " OR (state = 3 AND attempt = 0 AND amount_minor = 0 AND close_reason > 0)",
        name="paid_or_closed",
    ),
)

excess_payment = _table(
    "excess_payment",
    _key("payment_id"),
    _attempt_key(),
    Column("channel_trade_no", _Text, primary_key=True),
    # A NotifyOutcome: DUPLICATE, LATE, SECOND_CAPTURE or MISMATCH.
    Column("reason", _Code, nullable=False),
    *_capture_columns(),
    *_stamp(),
    CheckConstraint("reason IN (2, 3, 4, 5)", name="reason"),
    CheckConstraint("amount_minor > 0", name="amount_minor"),
)
# What a sweep has not seen yet of each writer. The outcome, which is written on the accepted path, goes without.
Index("ix_excess_payment_writer_no_group_no", excess_payment.c.writer_no, excess_payment.c.group_no)

refund = _table(
    "refund",
    _key("payment_id"),
    Column("refund_no", _Text, primary_key=True),
    Column("attempt", _Code, nullable=False),
    # The capture that it returns.
    Column("channel_trade_no", _Text, nullable=False),
    Column("amount_minor", _Int64, nullable=False),
    Column("currency", _Text, nullable=False),
    Column("reason", _Code, nullable=False),
    *_stamp(),
    CheckConstraint("amount_minor > 0", name="amount_minor"),
)
Index("ix_refund_writer_no_group_no", refund.c.writer_no, refund.c.group_no)

refund_try = _table(
    "refund_try",
    _key("payment_id"),
    Column("refund_no", _Text, primary_key=True),
    Column("seq", _Code, primary_key=True, autoincrement=False),
    # The number that the channel is sent; the same until its final word.
    Column("channel_refund_no", _Text, nullable=False),
    # Which share of the refunder's work it belongs to: by its payment.
    Column("slice", _Code, nullable=False),
    Column("state", _Code, nullable=False),
    Column("state_at_ms", _Int64, nullable=False),
    # How often the channel was asked about it or sent it.
    Column("asks", _Int64, nullable=False),
    Column("next_at_ms", _Int64, nullable=False),
    Column("lease_until_ms", _Int64, nullable=False),
    Column("lease_token", _Text, nullable=False),
    Column("last_error", _Text, nullable=False),
    *_stamp(),
    CheckConstraint("seq BETWEEN 1 AND 99", name="seq"),
    CheckConstraint("state BETWEEN 1 AND 7", name="state"),
)
# Spelled with literals, here and in queries: a database uses a partial index only where it can see that it fits.
REFUND_NEEDS_ATTENTION = refund_try.c.state == literal_column("7")
REFUND_UNFINISHED = refund_try.c.state.in_([literal_column(str(number)) for number in (1, 2, 3, 7)])
"""Tries without a final word: PENDING, UNKNOWN, ACCEPTED, NEEDS_ATTENTION."""

# What the refunder looks for: tries without a final word, by when they are due.
Index(
    "ix_refund_try_unfinished",
    refund_try.c.slice,
    refund_try.c.next_at_ms,
    sqlite_where=REFUND_UNFINISHED,
    postgresql_where=REFUND_UNFINISHED,
)

refund_result = _table(
    "refund_result",
    _key("payment_id"),
    Column("refund_no", _Text, primary_key=True),
    Column("seq", _Code, primary_key=True, autoincrement=False),
    # A RefundState: REFUNDED, REFUSED or RETURNED_BY_CHANNEL.
    Column("result", _Code, nullable=False),
    Column("code", _Text, nullable=False),
    Column("message", _Text, nullable=False),
    *_stamp(),
    CheckConstraint("result IN (4, 5, 6)", name="result"),
)

queried_paid = _table(
    "queried_paid",
    # The channel said, when it was asked, that this attempt is paid; written before its captures are judged.
    _key("payment_id"),
    _attempt_key(),
    *_stamp(),
)
Index("ix_queried_paid_writer_no_group_no", queried_paid.c.writer_no, queried_paid.c.group_no)

quarantine = _table(
    "quarantine",
    Column("quarantine_id", _Text, primary_key=True),
    # A NotifyOutcome: SECOND_CAPTURE, MISMATCH, CONFLICT or UNKNOWN.
    Column("reason", _Code, nullable=False),
    # What the order number says; NULL where it is not one of ours.
    Column("payment_id", _Int64),
    Column("attempt", _Code),
    Column("result", _Code, nullable=False),
    Column("channel", _Text, nullable=False),
    Column("account", _Text, nullable=False),
    Column("channel_order_no", _Text, nullable=False),
    Column("channel_trade_no", _Text, nullable=False),
    Column("amount_minor", _Int64, nullable=False),
    Column("currency", _Text, nullable=False),
    Column("paid_at_ms", _Int64),
    Column("source", _Code, nullable=False),
    Column("raw", LargeBinary, nullable=False),
    Column("headers", _Text, nullable=False),
    Column("first_seen_at_ms", _Int64, nullable=False),
    Column("last_seen_at_ms", _Int64, nullable=False),
    Column("arrivals", _Int64, nullable=False),
    # 1 until resolved, and again when the word comes once more.
    Column("is_open", _Code, nullable=False),
    # A JSON list of what was decided about it, when and by whom; only ever appended to.
    Column("resolutions", _Text, nullable=False),
    *_stamp(),
    CheckConstraint("reason IN (4, 5, 6, 7)", name="reason"),
)
Index("ix_quarantine_payment_id", quarantine.c.payment_id)
QUARANTINE_OPEN = quarantine.c.is_open == literal_column("1")
"""Evidence that nobody has resolved."""

Index(
    "ix_quarantine_open",
    quarantine.c.first_seen_at_ms,
    sqlite_where=QUARANTINE_OPEN,
    postgresql_where=QUARANTINE_OPEN,
)

quarantine_mark = _table(
    # How far open evidence of one age has been judged again: all up to (first_seen_at_ms, quarantine_id).
    "quarantine_mark",
    Column("rung", _Code, primary_key=True, autoincrement=False),
    Column("first_seen_at_ms", _Int64, nullable=False),
    Column("quarantine_id", _Text, nullable=False),
    # When this round began, where all open evidence is looked over in rounds; else 0.
    Column("round_at_ms", _Int64, nullable=False),
)

writer = _table(
    "writer",
    # Drawn by the database: each serial stream of commits takes a fresh one.
    Column("writer_no", _Int64, primary_key=True, autoincrement=True),
    Column("started_at_ms", _Int64, nullable=False),
    Column("seen_at_ms", _Int64, nullable=False),
)
# Which writers are alive, however many have died.
Index("ix_writer_seen_at_ms", writer.c.seen_at_ms)

task = _table(
    "task",
    _key("payment_id"),
    # A TaskKind. Attempt 0 where it is about the payment as a whole.
    Column("kind", _Code, primary_key=True, autoincrement=False),
    _attempt_key(),
    Column("slice", _Code, nullable=False),
    Column("next_at_ms", _Int64, nullable=False),
    # How often it was come back to.
    Column("looks", _Int64, nullable=False),
    Column("since_ms", _Int64, nullable=False),
    Column("last_error", _Text, nullable=False),
    *_stamp(),
    CheckConstraint("kind BETWEEN 1 AND 3", name="kind"),
)
Index("ix_task_due", task.c.kind, task.c.slice, task.c.next_at_ms)

lease = _table(
    "lease",
    # One row a job and share of the payments: whoever holds it until lease_until_ms works there alone.
    Column("job", _Text, primary_key=True),
    Column("slice", _Code, primary_key=True, autoincrement=False),
    Column("lease_until_ms", _Int64, nullable=False),
    Column("lease_token", _Text, nullable=False),
)

sweep_mark = _table(
    "sweep_mark",
    # How far a sweep has read what a writer wrote: every group up to this one.
    Column("sweep", _Text, primary_key=True),
    Column("writer_no", _Int64, primary_key=True, autoincrement=False),
    Column("group_no", _Int64, nullable=False),
)

sweep_pending = _table(
    "sweep_pending",
    # Payments with excess that had no outcome when a sweep saw it.
    _key("payment_id"),
    Column("slice", _Code, nullable=False),
    Column("since_ms", _Int64, nullable=False),
)

WRITTEN_BY_JOBS = frozenset({"writer", "lease", "task", "sweep_mark", "sweep_pending", "quarantine_mark"})
"""Tables that a server's jobs write to while nobody calls it: none says what happened to money."""
