"""What the refunder asks every second, and the gauges with it, is answered from indexes, however much is finished."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, event

from paycore.store import evidence, lookups, refunds, tasks
from paycore.store.engine import parse_database_url
from paycore.store.rows import TaskRow
from paycore.store.schema import migrate

ACCOUNTS = [("bank", "a"), ("bank", "b")]

READS: list[tuple[str, Callable[[Connection], Any], str]] = [
    ("is a refund due", lambda connection: refunds.due_refund_slices(connection, 1), "ix_refund_try_unfinished"),
    ("oldest refund due", lambda connection: refunds.oldest_due_refund_ms(connection, 1), "ix_refund_try_unfinished"),
    ("refunds due", lambda connection: refunds.due_refunds(connection, [3], 1, 10), "ix_refund_try_unfinished"),
    (
        "refunds due of accounts that can be asked about",
        lambda connection: refunds.due_refunds(connection, [3], 1, 10, ACCOUNTS),
        "ix_refund_try_unfinished",
    ),
    (
        "is a refund due of an account that can be asked about",
        lambda connection: refunds.due_refund_slices(connection, 1, ACCOUNTS),
        "ix_refund_try_unfinished",
    ),
    ("old refunds", lambda connection: refunds.untold_refunds(connection, 1, 1, 10), "ix_refund_try_unfinished"),
    ("is a task due", lambda connection: tasks.due_task_slices(connection, 1, 1), "ix_task_due"),
    ("oldest task due", lambda connection: tasks.oldest_due_task_ms(connection, 1, 1), "ix_task_due"),
    ("which tasks are due", lambda connection: tasks.due_tasks(connection, 1, 2, 1, 10), "ix_task_due"),
    (
        "which tasks are due behind another",
        lambda connection: tasks.due_tasks(connection, 1, 2, 1, 10, TaskRow(7, 1, 1, 2, 1, 0, 0, "", 0, 1, 1)),
        "ix_task_due (kind=? AND slice=? AND next_at_ms>? AND next_at_ms<?)",
    ),
    (
        "evidence of an age",
        lambda connection: evidence.open_between(connection, evidence.Place(5, "a"), 9, 10),
        "ix_quarantine_open (first_seen_at_ms>? AND first_seen_at_ms<?)",
    ),
    ("what is waiting: refunds", lookups.backlog, "ix_refund_try_unfinished"),
    ("what is waiting: quarantine", lookups.backlog, "ix_quarantine_open"),
]


def plans(path: Path, read: Callable[[Connection], Any]) -> str:
    """Run a read; return SQLite's plans of every statement that it sent."""
    sent: list[tuple[str, Any]] = []
    engine = parse_database_url(f"sqlite:///{path}").engine(writes=False)

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    with engine.connect() as connection, connection.begin():
        read(connection)
    engine.dispose()
    asked = sqlite3.connect(path)
    try:
        rows = [row for one, values in sent for row in asked.execute(f"EXPLAIN QUERY PLAN {one}", values)]
    finally:
        asked.close()
    return "\n".join(str(row[-1]) for row in rows)


@pytest.mark.parametrize(("read", "index"), [row[1:] for row in READS], ids=[row[0] for row in READS])
def test_frequent_read_uses_its_index(tmp_path: Path, read: Callable[[Connection], Any], index: str) -> None:
    migrate(f"sqlite:///{tmp_path / 'p.db'}")
    assert index in plans(tmp_path / "p.db", read)


def test_frequent_reads_scan_no_table_of_finished_work(tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path / 'p.db'}")
    for _, read, _ in READS:
        for line in plans(tmp_path / "p.db", read).splitlines():
            assert not line.startswith("SCAN") or "USING" in line or "CONSTANT ROW" in line, line


@pytest.mark.parametrize("accounts", [None, ACCOUNTS], ids=["any", "some"])
def test_due_refunds_of_a_share_come_out_of_the_index_in_their_order(
    tmp_path: Path, accounts: list[tuple[str, str]] | None
) -> None:
    """A long backlog is not sorted each time that a few of it are claimed."""
    migrate(f"sqlite:///{tmp_path / 'p.db'}")
    due = plans(tmp_path / "p.db", lambda connection: refunds.due_refunds(connection, [3], 1, 10, accounts))
    assert "ix_refund_try_unfinished" in due
    assert "TEMP B-TREE" not in due
