"""The schema on PostgreSQL as it is migrated, and which servers and sessions are refused."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import PrimaryKeyConstraint, UniqueConstraint, make_url

from paycore.store import postgresql_server, tables
from paycore.store.database import DatabaseRefusedError
from paycore.store.engine import parse_database_url
from paycore.store.schema import migrate, newest_version, open_store
from tests.support.postgres import OwnServer, connected, empty_postgres, fresh_postgres, own_server
from tests.support.racers import REPOSITORY

NOT_SHARDED = {"merchant_order", "quarantine", "quarantine_mark", "writer", "lease", "sweep_mark"}
"""What no payment's number can lead: Pay's own key, evidence that may name none of ours, and housekeeping."""

CATALOGUE = [
    # Columns, with their collation and what they are when nothing is given.
    """SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull, collname, pg_get_expr(adbin, adrelid)
       FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
       LEFT JOIN pg_collation ON pg_collation.oid = attcollation
       LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
       WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0""",
    """SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
       WHERE connamespace = 'public'::regnamespace AND contype <> 'n'""",
    "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
]


def catalogue(url: str) -> list[set[Any]]:
    """What a database says about its own tables, the record of its version left out."""
    with connected(url) as connection:
        found = [set(connection.execute(statement).fetchall()) for statement in CATALOGUE]
    return [{row for row in rows if row[0] != "alembic_version"} for rows in found]


def test_every_key_that_can_be_sharded_begins_with_the_payment() -> None:
    """Any engine that distributes by payment_id can hold these tables: a unique key is checked within one shard."""
    seen = set()
    for table in tables.METADATA.sorted_tables:
        keys = [one for one in table.constraints if isinstance(one, (PrimaryKeyConstraint, UniqueConstraint))]
        leading = [next(iter(key.columns)).name for key in keys]
        leading += [next(iter(index.columns)).name for index in table.indexes if index.unique]
        assert leading, table.name
        if table.name not in NOT_SHARDED:
            assert set(leading) == {"payment_id"}, table.name
            seen.add(table.name)
        assert not table.foreign_keys
    assert len(seen) == 10


def test_migrated_database_equals_the_metadata() -> None:
    migrated, made = fresh_postgres(), empty_postgres()
    engine = parse_database_url(made).engine(writes=True)
    with engine.begin() as connection:
        tables.METADATA.create_all(connection)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.METADATA) == []
    engine.dispose()
    assert catalogue(migrated) == catalogue(made)
    columns = catalogue(migrated)[0]
    assert {row[4] for row in columns if row[2] == "text"} == {"C"}
    assert {row[2] for row in columns if row[1].endswith(("_ms", "_minor"))} == {"bigint"}
    assert {row[2] for row in columns} <= {"bigint", "smallint", "text", "bytea"}


def test_migrate_a_second_time_changes_nothing() -> None:
    url = empty_postgres()
    assert migrate(url) == (None, newest_version())
    before = catalogue(url)
    assert migrate(url) == (newest_version(), newest_version())
    assert catalogue(url) == before
    open_store(url).dispose()


def test_two_migrations_at_once_both_succeed() -> None:
    program = "import sys; from paycore.store.schema import migrate; sys.stdin.read(1); print(migrate(sys.argv[1]))"
    url = empty_postgres()
    command = [sys.executable, "-c", program, url]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=REPOSITORY, text=True, **pipes) for _ in range(2)]
    answers = [process.communicate("\n", timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    open_store(url).dispose()


def test_open_refuses_a_database_without_tables_and_names_the_command() -> None:
    url = empty_postgres()
    shown = make_url(url).render_as_string()
    with pytest.raises(DatabaseRefusedError, match=rf"version none.* run: paycore migrate --db {re.escape(shown)}"):
        open_store(url)


def test_migration_that_fails_half_way_leaves_nothing() -> None:
    url = empty_postgres()
    with connected(url) as connection:
        connection.execute("CREATE TABLE refund (payment_id bigint)")
    with pytest.raises(DatabaseRefusedError):
        migrate(url)
    assert {row[0] for row in catalogue(url)[0]} == {"refund"}


# What is refused

REFUSED = [
    ("postgresql+asyncpg://u@h/d", "postgresql+asyncpg is not supported"),
    ("postgresql://u@h", "names no database"),
    ("postgresql://u@h/d?synchronous_commit=off", "synchronous_commit=off is refused: a crash would lose acknowledged"),
    ("postgresql://u@h/d?synchronous_commit=OFF", "synchronous_commit=off is refused"),
    ("postgresql://u@h/d?synchronous_commit=maybe", "synchronous_commit=maybe is not one of on"),
    ("postgresql://u@h/d?allow_fsync_off=yes", "allow_fsync_off=yes in the database URL must be 0 or 1"),
    ("postgresql://u@h/d?options=-cfsync=off", "unknown option in the database URL: options"),
    ("postgresql://u@h/d?password=hidden", "unknown option in the database URL: password"),
    ("postgresql://u:hidden@127.0.0.1:1/d", "u@127.0.0.1:1/d: cannot be reached"),
    ("postgresql//u:hidden@h/d", "not a database URL: 'h/d'"),
]


@pytest.mark.parametrize(("url", "why"), REFUSED, ids=[row[1] for row in REFUSED])
def test_url_that_cannot_be_used_is_refused_in_a_line_without_its_password(url: str, why: str) -> None:
    for refused in (open_store, migrate):
        with pytest.raises(DatabaseRefusedError) as error:
            refused(url)
        assert why in str(error.value)
        assert "\n" not in str(error.value)
        assert "hidden" not in str(error.value)


@pytest.fixture(scope="module")
def own() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


@pytest.mark.parametrize("switch", ["fsync", "full_page_writes", "synchronous_commit"])
def test_server_that_would_forget_is_refused_unless_told_by_name(own: OwnServer, switch: str) -> None:
    url = own.fresh_database()
    own.stop(signal.SIGINT)
    own.start(f"{switch}=off")
    try:
        for refused in (open_store, migrate):
            with pytest.raises(DatabaseRefusedError, match=rf"runs with {switch}=off: .* say allow_{switch}_off=1"):
                refused(url)
        store = open_store(f"{url}&allow_{switch}_off=1")
        assert store.open_writer(1) > 0
        store.dispose()
    finally:
        own.stop(signal.SIGINT)
        own.start()


def test_role_that_switches_durability_off_is_refused_and_the_url_overrules_it() -> None:
    url = fresh_postgres()
    name = make_url(url).database
    with connected(url) as connection:
        connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    with pytest.raises(DatabaseRefusedError, match="synchronous_commit=off"):
        open_store(url)
    open_store(f"{url}&synchronous_commit=remote_apply").dispose()


def test_old_server_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_server, "OLDEST_VERSION", 99)
    with pytest.raises(DatabaseRefusedError, match=r"PostgreSQL \d+ is too old; at least 99"):
        open_store(fresh_postgres())


SESSION = {
    "lock_timeout": "1300ms",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "3s",
    "application_name": "paycore",
    "synchronous_commit": "on",
    "transaction_isolation": "read committed",
    "transaction_read_only": "off",
}


def test_sessions_run_with_the_settings_that_the_store_relies_on() -> None:
    database = parse_database_url(fresh_postgres())
    readers = {**SESSION, "transaction_isolation": "repeatable read", "transaction_read_only": "on"}
    for writes, expected in ((True, SESSION), (False, readers)):
        engine = database.engine(writes=writes)
        with engine.connect() as connection:
            found = {name: connection.exec_driver_sql(f"SHOW {name}").scalar() for name in expected}
        engine.dispose()
        assert found == expected
