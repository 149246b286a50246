"""What docs/scaling.md tells people to run: every table is distributed or named as staying, and the copy copies all."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from paycore.store import postgresql_server, tables
from paycore.store.schema import open_store
from tests.support.books import rows
from tests.support.clock import ManualClock
from tests.support.core import Core, fresh_database, read_all
from tests.support.planting import prepare
from tests.support.postgres import REPOSITORY, fresh_postgres
from tests.support.sharded import SPREAD_BY

TEXT = (REPOSITORY / "docs/scaling.md").read_text()
IDLE_MS, SLOW_SECONDS = 100, 2.0
SESSIONS = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'paycore'"
    " AND pid <> pg_backend_pid()"
)


def test_every_table_is_distributed_by_the_column_that_leads_its_key_or_named_as_one_that_stays() -> None:
    commands = re.findall(r"create_distributed_table\('(\w+)', '(\w+)'(.*?)\);", TEXT)
    assert {table: column for table, column, _ in commands} == SPREAD_BY
    # Tables that are spread by payment_id lie together, and the first of them names how many parts there are.
    together = {table for table, _, more in commands if "colocate_with => 'payment'" in more} | {"payment"}
    assert together == {table for table, column in SPREAD_BY.items() if column == "payment_id"}
    (staying,) = re.findall(r"^((?:`\w+`(?:, | and )?)+) stay as they are", TEXT, re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", staying))
    assert named == tables.METADATA.tables.keys() - SPREAD_BY.keys() | {"alembic_version"}


async def test_copy_takes_every_row_along_however_long_the_old_database_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_server, "IDLE_IN_TRANSACTION_MS", IDLE_MS)
    old, new = f"sqlite:///{fresh_database(tmp_path / 'old.db')}", fresh_postgres()
    with Core(old, clock=ManualClock()) as core:
        await prepare(core, 3)
    (program,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "move.py" in block]
    idle: list[int] = []

    def take_time(connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if connection.dialect.name == "sqlite" and "count(" in statement and not idle:
            deadline = time.monotonic() + SLOW_SECONDS
            while (sessions := len(rows(new, SESSIONS))) and time.monotonic() < deadline:
                time.sleep(0.05)
            idle.append(sessions)

    monkeypatch.setattr(sys, "argv", ["move.py", old, new])
    event.listen(Engine, "before_cursor_execute", take_time)
    try:
        exec(compile(program, "move.py", "exec"), {})
    finally:
        event.remove(Engine, "before_cursor_execute", take_time)
    assert idle == [1]
    copied = read_all(new)
    assert copied == read_all(old)
    assert len(copied["payment"]) >= 3
    store = open_store(new)
    ((last,),) = rows(old, "SELECT max(writer_no) FROM writer")
    assert store.open_writer(1) > last
    store.dispose()
