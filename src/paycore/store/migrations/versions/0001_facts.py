"""The schema of facts. A frozen copy: what the tables are today is in ``store.tables``."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.INTEGER(), "sqlite")
_CODE = sa.SmallInteger().with_variant(sa.INTEGER(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def _stamp() -> list[sa.Column[int]]:
    return [
        sa.Column("recorded_at_ms", _INT64, nullable=False),
        sa.Column("writer_no", _INT64, nullable=False),
        sa.Column("group_no", _INT64, nullable=False),
    ]


def upgrade() -> None:
    """Apply this step."""
    _create_channel_order()
    _create_excess_payment()
    _create_merchant_order()
    _create_payment()
    _create_payment_outcome()
    _create_quarantine()
    _create_refund()
    _create_refund_result()
    _create_refund_try()
    _create_writer()


def _create_channel_order() -> None:
    op.create_table(
        "channel_order",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("attempt", _CODE, autoincrement=False, nullable=False),
        sa.Column("channel", _TEXT, nullable=False),
        sa.Column("account", _TEXT, nullable=False),
        sa.Column("method", _CODE, nullable=False),
        sa.Column("expire_at_ms", _INT64, nullable=False),
        sa.Column("state", _CODE, nullable=False),
        sa.Column("state_at_ms", _INT64, nullable=False),
        sa.Column("credential", _TEXT, nullable=False),
        sa.Column("failure_code", _TEXT, nullable=False),
        sa.Column("failure_message", _TEXT, nullable=False),
        sa.Column("failed_at_ms", _INT64, nullable=True),
        sa.Column("superseded_at_ms", _INT64, nullable=True),
        sa.Column("lease_until_ms", _INT64, nullable=False),
        sa.Column("lease_token", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("attempt BETWEEN 1 AND 63", name=op.f("ck_channel_order_attempt")),
        sa.CheckConstraint("state BETWEEN 1 AND 5", name=op.f("ck_channel_order_state")),
        sa.PrimaryKeyConstraint("payment_id", "attempt", name=op.f("pk_channel_order")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def _create_excess_payment() -> None:
    op.create_table(
        "excess_payment",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("attempt", _CODE, autoincrement=False, nullable=False),
        sa.Column("channel_trade_no", _TEXT, nullable=False),
        sa.Column("reason", _CODE, nullable=False),
        sa.Column("amount_minor", _INT64, nullable=False),
        sa.Column("currency", _TEXT, nullable=False),
        sa.Column("paid_at_ms", _INT64, nullable=True),
        sa.Column("received_at_ms", _INT64, nullable=False),
        sa.Column("source", _CODE, nullable=False),
        *_stamp(),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_excess_payment_amount_minor")),
        sa.CheckConstraint("reason IN (2, 3, 4, 5)", name=op.f("ck_excess_payment_reason")),
        sa.PrimaryKeyConstraint("payment_id", "attempt", "channel_trade_no", name=op.f("pk_excess_payment")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def _create_merchant_order() -> None:
    op.create_table(
        "merchant_order",
        sa.Column("merchant_id", _TEXT, nullable=False),
        sa.Column("merchant_order_no", _TEXT, nullable=False),
        sa.Column("payment_id", _INT64, nullable=False),
        *_stamp(),
        sa.PrimaryKeyConstraint("merchant_id", "merchant_order_no", name=op.f("pk_merchant_order")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def _create_payment() -> None:
    op.create_table(
        "payment",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("merchant_id", _TEXT, nullable=False),
        sa.Column("merchant_order_no", _TEXT, nullable=False),
        sa.Column("amount_minor", _INT64, nullable=False),
        sa.Column("currency", _TEXT, nullable=False),
        sa.Column("subject", _TEXT, nullable=False),
        sa.Column("return_url", _TEXT, nullable=False),
        sa.Column("terms_digest", _TEXT, nullable=False),
        sa.Column("expire_at_ms", _INT64, nullable=False),
        *_stamp(),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_payment_amount_minor")),
        sa.CheckConstraint("payment_id > 0", name=op.f("ck_payment_payment_id")),
        sa.PrimaryKeyConstraint("payment_id", name=op.f("pk_payment")),
        sqlite_strict=True,
        sqlite_with_rowid=True,
    )


def _create_payment_outcome() -> None:
    op.create_table(
        "payment_outcome",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("state", _CODE, nullable=False),
        sa.Column("attempt", _CODE, nullable=False),
        sa.Column("channel_trade_no", _TEXT, nullable=False),
        sa.Column("amount_minor", _INT64, nullable=False),
        sa.Column("currency", _TEXT, nullable=False),
        sa.Column("paid_at_ms", _INT64, nullable=True),
        sa.Column("received_at_ms", _INT64, nullable=False),
        sa.Column("source", _CODE, nullable=False),
        sa.Column("paid_at_untrusted", _CODE, nullable=False),
        sa.Column("close_reason", _CODE, nullable=False),
        *_stamp(),
        sa.CheckConstraint(
            "(state = 2 AND attempt BETWEEN 1 AND 63 AND amount_minor > 0 AND close_reason = 0)"
            " OR (state = 3 AND attempt = 0 AND amount_minor = 0 AND close_reason > 0)",
            name=op.f("ck_payment_outcome_paid_or_closed"),
        ),
        sa.PrimaryKeyConstraint("payment_id", name=op.f("pk_payment_outcome")),
        sqlite_strict=True,
        sqlite_with_rowid=True,
    )


def _create_quarantine() -> None:
    op.create_table(
        "quarantine",
        sa.Column("quarantine_id", _TEXT, nullable=False),
        sa.Column("reason", _CODE, nullable=False),
        sa.Column("payment_id", _INT64, nullable=True),
        sa.Column("attempt", _CODE, nullable=True),
        sa.Column("result", _CODE, nullable=False),
        sa.Column("channel", _TEXT, nullable=False),
        sa.Column("account", _TEXT, nullable=False),
        sa.Column("channel_order_no", _TEXT, nullable=False),
        sa.Column("channel_trade_no", _TEXT, nullable=False),
        sa.Column("amount_minor", _INT64, nullable=False),
        sa.Column("currency", _TEXT, nullable=False),
        sa.Column("paid_at_ms", _INT64, nullable=True),
        sa.Column("source", _CODE, nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("headers", _TEXT, nullable=False),
        sa.Column("first_seen_at_ms", _INT64, nullable=False),
        sa.Column("last_seen_at_ms", _INT64, nullable=False),
        sa.Column("arrivals", _INT64, nullable=False),
        sa.Column("is_open", _CODE, nullable=False),
        sa.Column("resolutions", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("reason IN (4, 5, 6, 7)", name=op.f("ck_quarantine_reason")),
        sa.PrimaryKeyConstraint("quarantine_id", name=op.f("pk_quarantine")),
        sqlite_strict=True,
        sqlite_with_rowid=True,
    )
    op.create_index(
        "ix_quarantine_open",
        "quarantine",
        ["first_seen_at_ms"],
        unique=False,
        sqlite_where=sa.text("is_open = 1"),
        postgresql_where=sa.text("is_open = 1"),
    )
    op.create_index("ix_quarantine_payment_id", "quarantine", ["payment_id"], unique=False)


def _create_refund() -> None:
    op.create_table(
        "refund",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("refund_no", _TEXT, nullable=False),
        sa.Column("attempt", _CODE, nullable=False),
        sa.Column("channel_trade_no", _TEXT, nullable=False),
        sa.Column("amount_minor", _INT64, nullable=False),
        sa.Column("currency", _TEXT, nullable=False),
        sa.Column("reason", _CODE, nullable=False),
        *_stamp(),
        sa.CheckConstraint("amount_minor > 0", name=op.f("ck_refund_amount_minor")),
        sa.PrimaryKeyConstraint("payment_id", "refund_no", name=op.f("pk_refund")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def _create_refund_result() -> None:
    op.create_table(
        "refund_result",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("refund_no", _TEXT, nullable=False),
        sa.Column("seq", _CODE, autoincrement=False, nullable=False),
        sa.Column("result", _CODE, nullable=False),
        sa.Column("code", _TEXT, nullable=False),
        sa.Column("message", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("result IN (4, 5)", name=op.f("ck_refund_result_result")),
        sa.PrimaryKeyConstraint("payment_id", "refund_no", "seq", name=op.f("pk_refund_result")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def _create_refund_try() -> None:
    op.create_table(
        "refund_try",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("refund_no", _TEXT, nullable=False),
        sa.Column("seq", _CODE, autoincrement=False, nullable=False),
        sa.Column("channel_refund_no", _TEXT, nullable=False),
        sa.Column("state", _CODE, nullable=False),
        sa.Column("state_at_ms", _INT64, nullable=False),
        sa.Column("asks", _INT64, nullable=False),
        sa.Column("next_at_ms", _INT64, nullable=False),
        sa.Column("lease_until_ms", _INT64, nullable=False),
        sa.Column("lease_token", _TEXT, nullable=False),
        sa.Column("last_error", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("seq BETWEEN 1 AND 99", name=op.f("ck_refund_try_seq")),
        sa.CheckConstraint("state BETWEEN 1 AND 5", name=op.f("ck_refund_try_state")),
        sa.PrimaryKeyConstraint("payment_id", "refund_no", "seq", name=op.f("pk_refund_try")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index(
        "ix_refund_try_unfinished",
        "refund_try",
        ["next_at_ms"],
        unique=False,
        sqlite_where=sa.text("state IN (1, 2, 3)"),
        postgresql_where=sa.text("state IN (1, 2, 3)"),
    )


def _create_writer() -> None:
    op.create_table(
        "writer",
        sa.Column("writer_no", _INT64, autoincrement=True, nullable=False),
        sa.Column("started_at_ms", _INT64, nullable=False),
        sa.Column("seen_at_ms", _INT64, nullable=False),
        sa.PrimaryKeyConstraint("writer_no", name=op.f("pk_writer")),
        sqlite_strict=True,
        sqlite_with_rowid=True,
    )
