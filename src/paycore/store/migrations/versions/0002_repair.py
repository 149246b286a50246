"""What repair works by: leases, tasks, how far sweeps have read; more states of a refund.

``refund_try`` and ``refund_result`` are made anew, because SQLite cannot change the rule of a column. Payments that
are open get the tasks that Pay gives to new ones, due at once.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_INT64 = sa.BigInteger().with_variant(sa.INTEGER(), "sqlite")
_CODE = sa.SmallInteger().with_variant(sa.INTEGER(), "sqlite")
_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

# Shares as domain.ids.slice_of gives them: ((payment_id >> 22) & 15).
_COPY_TRIES = """
INSERT INTO refund_try (payment_id, refund_no, seq, channel_refund_no, slice, state, state_at_ms, asks, next_at_ms,
  lease_until_ms, lease_token, last_error, recorded_at_ms, writer_no, group_no)
SELECT payment_id, refund_no, seq, channel_refund_no, ((payment_id >> 22) & 15), state, state_at_ms, asks, next_at_ms,
  lease_until_ms, lease_token, last_error, recorded_at_ms, writer_no, group_no
FROM refund_try_before
"""
# Kind 1 closes a payment at its expiry, kind 2 asks about an attempt: domain.verdicts.TaskKind.
_GIVE_CLOSE_TASKS = """
INSERT INTO task (payment_id, kind, attempt, slice, next_at_ms, looks, since_ms, last_error, recorded_at_ms, writer_no,
  group_no)
SELECT payment_id, 1, 0, ((payment_id >> 22) & 15), expire_at_ms + 1, 0, recorded_at_ms, '', recorded_at_ms, writer_no,
  group_no
FROM payment
WHERE NOT EXISTS (SELECT 1 FROM payment_outcome WHERE payment_outcome.payment_id = payment.payment_id)
"""
_GIVE_QUERY_TASKS = """
INSERT INTO task (payment_id, kind, attempt, slice, next_at_ms, looks, since_ms, last_error, recorded_at_ms, writer_no,
  group_no)
SELECT payment_id, 2, attempt, ((payment_id >> 22) & 15), recorded_at_ms, 0, recorded_at_ms, '', recorded_at_ms,
  writer_no, group_no
FROM channel_order
WHERE NOT EXISTS (SELECT 1 FROM payment_outcome WHERE payment_outcome.payment_id = channel_order.payment_id)
"""


def _stamp() -> list[sa.Column[int]]:
    return [
        sa.Column("recorded_at_ms", _INT64, nullable=False),
        sa.Column("writer_no", _INT64, nullable=False),
        sa.Column("group_no", _INT64, nullable=False),
    ]


def upgrade() -> None:
    """Apply this step."""
    for table in ("excess_payment", "refund"):
        op.create_index(f"ix_{table}_writer_no_group_no", table, ["writer_no", "group_no"], unique=False)
    _renew_refund_try()
    _renew_refund_result()
    _create_queried_paid()
    _create_task()
    _create_housekeeping()
    op.create_index("ix_writer_seen_at_ms", "writer", ["seen_at_ms"], unique=False)
    _give_tasks()


def _renew_refund_try() -> None:
    op.drop_index("ix_refund_try_unfinished", "refund_try")
    op.rename_table("refund_try", "refund_try_before")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX pk_refund_try RENAME TO pk_refund_try_before")
    op.create_table(
        "refund_try",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("refund_no", _TEXT, nullable=False),
        sa.Column("seq", _CODE, autoincrement=False, nullable=False),
        sa.Column("channel_refund_no", _TEXT, nullable=False),
        sa.Column("slice", _CODE, nullable=False),
        sa.Column("state", _CODE, nullable=False),
        sa.Column("state_at_ms", _INT64, nullable=False),
        sa.Column("asks", _INT64, nullable=False),
        sa.Column("next_at_ms", _INT64, nullable=False),
        sa.Column("lease_until_ms", _INT64, nullable=False),
        sa.Column("lease_token", _TEXT, nullable=False),
        sa.Column("last_error", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("seq BETWEEN 1 AND 99", name=op.f("ck_refund_try_seq")),
        sa.CheckConstraint("state BETWEEN 1 AND 7", name=op.f("ck_refund_try_state")),
        sa.PrimaryKeyConstraint("payment_id", "refund_no", "seq", name=op.f("pk_refund_try")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.execute(_COPY_TRIES)
    op.drop_table("refund_try_before")
    op.create_index(
        "ix_refund_try_unfinished",
        "refund_try",
        ["slice", "next_at_ms"],
        unique=False,
        sqlite_where=sa.text("state IN (1, 2, 3, 7)"),
        postgresql_where=sa.text("state IN (1, 2, 3, 7)"),
    )


def _renew_refund_result() -> None:
    op.rename_table("refund_result", "refund_result_before")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("ALTER INDEX pk_refund_result RENAME TO pk_refund_result_before")
    op.create_table(
        "refund_result",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("refund_no", _TEXT, nullable=False),
        sa.Column("seq", _CODE, autoincrement=False, nullable=False),
        sa.Column("result", _CODE, nullable=False),
        sa.Column("code", _TEXT, nullable=False),
        sa.Column("message", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("result IN (4, 5, 6)", name=op.f("ck_refund_result_result")),
        sa.PrimaryKeyConstraint("payment_id", "refund_no", "seq", name=op.f("pk_refund_result")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.execute("INSERT INTO refund_result SELECT * FROM refund_result_before")
    op.drop_table("refund_result_before")


def _create_queried_paid() -> None:
    op.create_table(
        "queried_paid",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("attempt", _CODE, autoincrement=False, nullable=False),
        *_stamp(),
        sa.PrimaryKeyConstraint("payment_id", "attempt", name=op.f("pk_queried_paid")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("ix_queried_paid_writer_no_group_no", "queried_paid", ["writer_no", "group_no"], unique=False)


def _create_task() -> None:
    op.create_table(
        "task",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("kind", _CODE, autoincrement=False, nullable=False),
        sa.Column("attempt", _CODE, autoincrement=False, nullable=False),
        sa.Column("slice", _CODE, nullable=False),
        sa.Column("next_at_ms", _INT64, nullable=False),
        sa.Column("looks", _INT64, nullable=False),
        sa.Column("since_ms", _INT64, nullable=False),
        sa.Column("last_error", _TEXT, nullable=False),
        *_stamp(),
        sa.CheckConstraint("kind BETWEEN 1 AND 3", name=op.f("ck_task_kind")),
        sa.PrimaryKeyConstraint("payment_id", "kind", "attempt", name=op.f("pk_task")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_index("ix_task_due", "task", ["kind", "slice", "next_at_ms"], unique=False)


def _create_housekeeping() -> None:
    op.create_table(
        "lease",
        sa.Column("job", _TEXT, nullable=False),
        sa.Column("slice", _CODE, autoincrement=False, nullable=False),
        sa.Column("lease_until_ms", _INT64, nullable=False),
        sa.Column("lease_token", _TEXT, nullable=False),
        sa.PrimaryKeyConstraint("job", "slice", name=op.f("pk_lease")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "sweep_mark",
        sa.Column("sweep", _TEXT, nullable=False),
        sa.Column("writer_no", _INT64, autoincrement=False, nullable=False),
        sa.Column("group_no", _INT64, nullable=False),
        sa.PrimaryKeyConstraint("sweep", "writer_no", name=op.f("pk_sweep_mark")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.create_table(
        "quarantine_mark",
        sa.Column("rung", _CODE, autoincrement=False, nullable=False),
        sa.Column("first_seen_at_ms", _INT64, nullable=False),
        sa.Column("quarantine_id", _TEXT, nullable=False),
        sa.Column("round_at_ms", _INT64, nullable=False),
        sa.PrimaryKeyConstraint("rung", name=op.f("pk_quarantine_mark")),
        sqlite_strict=True,
        sqlite_with_rowid=True,
    )
    op.create_table(
        "sweep_pending",
        sa.Column("payment_id", _INT64, autoincrement=False, nullable=False),
        sa.Column("slice", _CODE, nullable=False),
        sa.Column("since_ms", _INT64, nullable=False),
        sa.PrimaryKeyConstraint("payment_id", name=op.f("pk_sweep_pending")),
        sqlite_strict=True,
        sqlite_with_rowid=True,
    )


def _give_tasks() -> None:
    op.execute(_GIVE_CLOSE_TASKS)
    op.execute(_GIVE_QUERY_TASKS)
