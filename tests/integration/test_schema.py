"""The schema of facts as it lies in the file: columns, keys, rules, versions, and the durability insisted on."""

from __future__ import annotations

import inspect
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, Dialect, Table
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from paycore.domain.errors import StoreUnavailableError
from paycore.store import rows, tables
from paycore.store.engine import DatabaseRefusedError, SqliteFile, parse_database_url, sqlite_file
from paycore.store.rows import Stamp
from paycore.store.schema import migrate, newest_version, open_store
from paycore.store.sqlite import SqliteStore
from tests.support.core import fresh_database
from tests.support.racers import REPOSITORY

TABLES = {table.name: table for table in tables.METADATA.sorted_tables}

SQLITE: Dialect = sqlite.dialect()
POSTGRESQL: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it open

KEYS = {
    "merchant_order": ["merchant_id", "merchant_order_no"],
    "payment": ["payment_id"],
    "channel_order": ["payment_id", "attempt"],
    "payment_outcome": ["payment_id"],
    "excess_payment": ["payment_id", "attempt", "channel_trade_no"],
    "refund": ["payment_id", "refund_no"],
    "refund_try": ["payment_id", "refund_no", "seq"],
    "refund_result": ["payment_id", "refund_no", "seq"],
    "quarantine": ["quarantine_id"],
    "queried_paid": ["payment_id", "attempt"],
    "task": ["payment_id", "kind", "attempt"],
    "sweep_pending": ["payment_id"],
    "lease": ["job", "slice"],
    "sweep_mark": ["sweep", "writer_no"],
    "quarantine_mark": ["rung"],
    "writer": ["writer_no"],
}

STAMP = {"recorded_at_ms", "writer_no", "group_no"}
CAPTURE = {"attempt", "channel_trade_no", "amount_minor", "currency", "paid_at_ms", "source"}
NAMED_BY_THE_DESIGN = {
    "merchant_order": {"payment_id", *STAMP},
    "payment": {
        *("merchant_id", "merchant_order_no", "amount_minor", "currency", "subject", "return_url", "expire_at_ms"),
        *STAMP,
    },
    "channel_order": {
        *("channel", "account", "method", "expire_at_ms", "credential", "state", "lease_until_ms", "lease_token"),
        *STAMP,
    },
    "payment_outcome": {"state", *CAPTURE, "close_reason", *STAMP},
    "excess_payment": {"reason", *CAPTURE, *STAMP},
    "refund": {"channel_trade_no", "attempt", "amount_minor", "currency", "reason", *STAMP},
    "refund_try": {"channel_refund_no", "state", "lease_until_ms", "lease_token", *STAMP},
    "refund_result": {"result", *STAMP},
    "quarantine": {
        *("reason", "result", "channel", "account", "channel_order_no", "channel_trade_no", "amount_minor", "currency"),
        *("raw", "headers", "first_seen_at_ms", "last_seen_at_ms", "resolutions", *STAMP),
    },
    "queried_paid": {*STAMP},
    "task": {"next_at_ms", "looks", *STAMP},
    "sweep_pending": set(),
    "lease": {"lease_until_ms", "lease_token"},
    "sweep_mark": {"group_no"},
    "quarantine_mark": {"first_seen_at_ms", "quarantine_id"},
    "writer": set(),
}

ROW_CLASSES: dict[str, Any] = {
    "payment": rows.PaymentRow,
    "channel_order": rows.ChannelOrderRow,
    "payment_outcome": rows.OutcomeRow,
    "excess_payment": rows.ExcessRow,
    "refund": rows.RefundRow,
    "refund_try": rows.RefundTryRow,
    "refund_result": rows.RefundResultRow,
    "quarantine": rows.QuarantineRow,
    "task": rows.TaskRow,
}


@pytest.fixture
def db_path(tmp_path: Path) -> Path:
    return fresh_database(tmp_path / "paycore.db")


def execute(path: Path, *statements: str) -> list[Any]:
    """Run statements on a plain connection; return the rows of the last."""
    connection = sqlite3.connect(path)
    try:
        found: list[Any] = []
        for statement in statements:
            found = connection.execute(statement).fetchall()
        connection.commit()
        return found
    finally:
        connection.close()


# What the tables are


def test_schema_has_every_table_key_and_column_that_the_design_names(db_path: Path) -> None:
    found = {name for (name,) in execute(db_path, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert found - {"alembic_version", "sqlite_sequence"} == set(KEYS) == set(TABLES)
    for name, key in KEYS.items():
        columns = execute(db_path, f"PRAGMA table_info({name})")
        in_key = sorted((place, column) for _, column, _, _, _, place in columns if place)
        assert [column for _, column in in_key] == key, name
        assert NAMED_BY_THE_DESIGN[name] <= {column[1] for column in columns}, name


def test_keys_start_with_the_payment_and_no_table_has_a_foreign_key(db_path: Path) -> None:
    for name, key in KEYS.items():
        if name not in {"merchant_order", "quarantine", "quarantine_mark", "writer", "lease", "sweep_mark"}:
            assert key[0] == "payment_id"
        assert execute(db_path, f"PRAGMA foreign_key_list({name})") == []
        assert not TABLES[name].foreign_keys


@pytest.mark.parametrize("name", ROW_CLASSES)
def test_rows_have_the_columns_as_fields_in_their_order(db_path: Path, name: str) -> None:
    columns = [column[1] for column in execute(db_path, f"PRAGMA table_info({name})")]
    assert list(ROW_CLASSES[name]._fields) == columns == [column.name for column in TABLES[name].columns]


def test_rows_end_with_the_stamp_in_its_order() -> None:
    for row_class in ROW_CLASSES.values():
        assert row_class._fields[-3:] == Stamp._fields
    defined = {item for _, item in inspect.getmembers(rows, inspect.isclass) if item.__name__.endswith("Row")}
    assert defined == set(ROW_CLASSES.values())


def test_money_and_times_are_strict_integers(db_path: Path) -> None:
    """R9: a table that is STRICT takes no float into an integer column."""
    for name, table in TABLES.items():
        types = {column[1]: column[2] for column in execute(db_path, f"PRAGMA table_info({name})")}
        assert set(types.values()) <= {"INTEGER", "TEXT", "BLOB"}, name
        for column in table.columns:
            if column.name.endswith(("_ms", "_minor")) or column.name in {"attempt", "seq", "payment_id"}:
                assert types[column.name] == "INTEGER"
    with pytest.raises(sqlite3.IntegrityError, match="cannot store REAL value"):
        execute(
            db_path,
            "INSERT INTO payment VALUES (1, 'm', 'n', 12.5, 'CNY', 's', '', 'd', 1, 1, 1, 1)",
        )


@pytest.mark.parametrize(
    ("table", "values", "rule"),
    [
        ("payment", "(1, 'm', 'n', 0, 'CNY', 's', '', 'd', 1, 1, 1, 1)", "ck_payment_amount_minor"),
        ("payment", "(0, 'm', 'n', 1, 'CNY', 's', '', 'd', 1, 1, 1, 1)", "ck_payment_payment_id"),
        ("channel_order", "(1, 0, 'c', 'a', 1, 1, 1, 1, '', '', '', NULL, NULL, 0, '', 1, 1, 1)", "attempt"),
        ("channel_order", "(1, 64, 'c', 'a', 1, 1, 1, 1, '', '', '', NULL, NULL, 0, '', 1, 1, 1)", "attempt"),
        ("channel_order", "(1, 1, 'c', 'a', 1, 1, 6, 1, '', '', '', NULL, NULL, 0, '', 1, 1, 1)", "state"),
        ("payment_outcome", "(1, 1, 1, 'T', 1, 'CNY', 1, 1, 1, 0, 0, 1, 1, 1)", "paid_or_closed"),
        ("payment_outcome", "(1, 2, 0, 'T', 1, 'CNY', 1, 1, 1, 0, 0, 1, 1, 1)", "paid_or_closed"),
        ("payment_outcome", "(1, 2, 1, 'T', 0, 'CNY', 1, 1, 1, 0, 0, 1, 1, 1)", "paid_or_closed"),
        ("payment_outcome", "(1, 3, 1, 'T', 1, 'CNY', 1, 1, 1, 0, 1, 1, 1, 1)", "paid_or_closed"),
        ("payment_outcome", "(1, 3, 0, '', 0, '', NULL, 1, 0, 0, 0, 1, 1, 1)", "paid_or_closed"),
        ("excess_payment", "(1, 1, 'T', 1, 1, 'CNY', 1, 1, 1, 1, 1, 1)", "reason"),
        ("excess_payment", "(1, 1, 'T', 2, 0, 'CNY', 1, 1, 1, 1, 1, 1)", "amount_minor"),
        ("refund", "(1, 'X', 1, 'T', 0, 'CNY', 2, 1, 1, 1)", "amount_minor"),
        ("refund_try", "(1, 'X', 0, 'N', 0, 1, 1, 0, 1, 0, '', '', 1, 1, 1)", "seq"),
        ("refund_try", "(1, 'X', 100, 'N', 0, 1, 1, 0, 1, 0, '', '', 1, 1, 1)", "seq"),
        ("refund_try", "(1, 'X', 1, 'N', 0, 9, 1, 0, 1, 0, '', '', 1, 1, 1)", "state"),
        ("refund_result", "(1, 'X', 1, 1, '', '', 1, 1, 1)", "result"),
        ("refund_result", "(1, 'X', 1, 7, '', '', 1, 1, 1)", "result"),
        ("task", "(1, 4, 0, 0, 1, 0, 1, '', 1, 1, 1)", "kind"),
        (
            "quarantine",
            "('q', 1, NULL, NULL, 1, 'c', 'a', 'n', 'T', 1, 'CNY', 1, 1, x'', '', 1, 1, 1, 1, '[]', 1, 1, 1)",
            "reason",
        ),
    ],
)
def test_row_that_contradicts_itself_is_refused_by_the_database(
    db_path: Path, table: str, values: str, rule: str
) -> None:
    with pytest.raises(sqlite3.IntegrityError, match=rf"CHECK constraint failed: \w*{rule}"):
        execute(db_path, f"INSERT INTO {table} VALUES {values}")


def test_outcome_key_takes_one_row_a_payment_for_ever(db_path: Path) -> None:
    """R1 is this key."""
    paid = "INSERT INTO payment_outcome VALUES (1, 2, 1, 'T', 1, 'CNY', 1, 1, 1, 0, 0, 1, 1, 1)"
    closed = "INSERT INTO payment_outcome VALUES (1, 3, 0, '', 0, '', NULL, 1, 0, 0, 1, 1, 1, 1)"
    execute(db_path, paid)
    for second in (paid, closed):
        with pytest.raises(sqlite3.IntegrityError, match=r"UNIQUE constraint failed: payment_outcome\.payment_id"):
            execute(db_path, second)


# The migrated file and the tables in the code are one


def test_migrated_database_equals_the_metadata(db_path: Path) -> None:
    engine = parse_database_url(f"sqlite:///{db_path}").engine(writes=False)
    try:
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.METADATA) == []
    finally:
        engine.dispose()


def words(sql: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", sql.lower().replace('"', ""))


@pytest.mark.parametrize("name", KEYS)
def test_migrated_table_is_spelled_as_the_metadata_spells_it(db_path: Path, name: str) -> None:
    """Autogeneration sees neither STRICT nor WITHOUT ROWID nor CHECK: the statements themselves are compared."""
    table = TABLES[name]
    ((migrated,),) = execute(db_path, f"SELECT sql FROM sqlite_master WHERE name = '{name}'")
    parsed = str(CreateTable(table).compile(dialect=SQLITE))
    assert parts(migrated) == parts(parsed)
    assert "strict" in words(migrated)
    assert ("without" in words(migrated)) is (len(KEYS[name]) > 1)
    checks = [constraint for constraint in table.constraints if isinstance(constraint, CheckConstraint)]
    assert words(migrated).count("check") == len(checks)


def parts(create_table: str) -> tuple[list[str], str]:
    """The lines between the brackets, whatever their order, and the table's options."""
    body, _, options = create_table.partition("(")[2].rpartition(")")
    lines = [" ".join(words(line.strip().rstrip(","))) for line in body.strip().splitlines()]
    return sorted(lines), " ".join(words(options))


def test_indexes_are_those_of_the_metadata(db_path: Path) -> None:
    found = dict(execute(db_path, "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"))
    assert set(found) == {index.name for table in TABLES.values() for index in table.indexes}
    assert "where is_open = 1" in found["ix_quarantine_open"].lower()
    assert "where state in (1, 2, 3, 7)" in found["ix_refund_try_unfinished"].lower()


@pytest.mark.parametrize("table", TABLES.values(), ids=str)
def test_tables_can_be_created_on_postgresql_too(table: Table) -> None:
    statement = str(CreateTable(table).compile(dialect=POSTGRESQL))
    assert "STRICT" not in statement
    for column in table.columns:
        if column.name.endswith(("_ms", "_minor")) or column.name == "payment_id":
            assert re.search(rf"{column.name} BIGINT", statement), column.name


# Versions


def test_migrate_makes_the_file_and_a_second_time_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    assert migrate(url) == (None, newest_version())
    before = execute(tmp_path / "new.db", "SELECT name, sql FROM sqlite_master ORDER BY name")
    assert migrate(url) == (newest_version(), newest_version())
    assert execute(tmp_path / "new.db", "SELECT name, sql FROM sqlite_master ORDER BY name") == before


def test_migrate_keeps_the_rows(db_path: Path) -> None:
    execute(db_path, "INSERT INTO payment VALUES (1, 'm', 'n', 1, 'CNY', 's', '', 'd', 1, 1, 1, 1)")
    migrate(f"sqlite:///{db_path}")
    assert execute(db_path, "SELECT count(*) FROM payment") == [(1,)]


def test_two_migrations_at_once_both_succeed(tmp_path: Path) -> None:
    program = "import sys; from paycore.store.schema import migrate; sys.stdin.read(1); print(migrate(sys.argv[1]))"
    for number in range(2):
        url = f"sqlite:///{tmp_path / f'{number}.db'}"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", program, url],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        answers = [process.communicate("\n", timeout=60) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], answers
        open_store(url).dispose()


def test_open_refuses_a_missing_file_and_names_the_command(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'absent.db'}"
    with pytest.raises(DatabaseRefusedError, match=rf"no such database; run: paycore migrate --db {re.escape(url)}"):
        open_store(url)
    assert not (tmp_path / "absent.db").exists()


def test_open_refuses_a_newer_version(db_path: Path) -> None:
    execute(db_path, "UPDATE alembic_version SET version_num = '9999'")
    for refused in (open_store, migrate):
        with pytest.raises(DatabaseRefusedError, match=r"9999 is newer than this paycore .* install the paycore"):
            refused(f"sqlite:///{db_path}")


@pytest.mark.parametrize("statement", ["DELETE FROM alembic_version", "DROP TABLE alembic_version"])
def test_open_refuses_a_database_without_its_version_and_names_the_command(db_path: Path, statement: str) -> None:
    execute(db_path, statement)
    url = f"sqlite:///{db_path}"
    with pytest.raises(DatabaseRefusedError, match=rf"version none.* run: paycore migrate --db {re.escape(url)}"):
        open_store(url)


def test_open_refuses_an_empty_file_and_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "empty.db"
    path.touch()
    with pytest.raises(DatabaseRefusedError, match="version none"):
        open_store(f"sqlite:///{path}")


@pytest.mark.parametrize("refused", [open_store, migrate])
def test_file_that_is_no_database_is_refused_in_one_line(tmp_path: Path, refused: Any) -> None:
    path = tmp_path / "letter.db"
    path.write_bytes(b"Dear Sir or Madam, this is not a database. " * 100)
    with pytest.raises(DatabaseRefusedError, match="not a sound SQLite database; restore it from a backup") as error:
        refused(f"sqlite:///{path}")
    assert "\n" not in str(error.value)
    assert path.read_bytes().startswith(b"Dear Sir")


@pytest.mark.parametrize("refused", [open_store, migrate])
def test_damaged_database_is_refused(db_path: Path, refused: Any) -> None:
    damage(db_path)
    with pytest.raises(DatabaseRefusedError, match="not a sound SQLite database"):
        refused(f"sqlite:///{db_path}")


def damage(path: Path) -> None:
    """Overwrite every page behind the file's header."""
    content = bytearray(path.read_bytes())
    content[100:] = b"\xa5" * (len(content) - 100)
    path.write_bytes(content)


def test_migrate_into_a_missing_folder_says_what_to_check(tmp_path: Path) -> None:
    with pytest.raises(DatabaseRefusedError, match="cannot be opened; check that its folder exists"):
        migrate(f"sqlite:///{tmp_path / 'nowhere' / 'paycore.db'}")


def test_migrate_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "half.db"
    execute(path, "CREATE TABLE refund (payment_id INTEGER)")
    with pytest.raises(DatabaseRefusedError):
        migrate(f"sqlite:///{path}")
    assert execute(path, "SELECT name FROM sqlite_master WHERE type = 'table'") == [("refund",)]


# Durability


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sqlite://", "in-memory database forgets acknowledged payments"),
        ("sqlite:///:memory:", "in-memory database forgets acknowledged payments"),
        ("sqlite:///file::memory:?cache=shared", "in-memory database forgets acknowledged payments"),
        ("sqlite:///p.db?synchronous=NORMAL", "synchronous=NORMAL is refused: a power cut would lose acknowledged"),
        ("sqlite:///p.db?synchronous=off", "synchronous=OFF is refused: a power cut would lose acknowledged"),
        ("sqlite:///p.db?synchronous=1", "synchronous=1 is refused"),
        ("sqlite:///p.db?Synchronous=NORMAL", "synchronous=NORMAL is refused"),
        ("sqlite:///p.db?journal_mode=DELETE", "journal_mode=DELETE is refused: readers would block the writer"),
        ("sqlite:///p.db?journal_mode=MEMORY", "journal_mode=MEMORY is refused"),
        ("sqlite:///p.db?mode=memory", "unknown option in the database URL: mode"),
        ("sqlite:///p.db?timeout=5", "unknown option in the database URL: timeout"),
        ("mysql://localhost/paycore", "mysql is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"),
        ("paycore.db", "not a database URL"),
        ("", "not a database URL"),
    ],
)
def test_database_that_could_forget_is_refused_and_told_why(url: str, why: str) -> None:
    for refused in (open_store, migrate):
        with pytest.raises(DatabaseRefusedError) as error:
            refused(url)
        assert why in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("query", "level"), [("", 2), ("?synchronous=FULL", 2), ("?synchronous=extra", 3)])
def test_writers_connection_runs_with_the_durability_it_was_asked_for(db_path: Path, query: str, level: int) -> None:
    # A file that somebody has switched to another journal is switched back.
    execute(db_path, "PRAGMA journal_mode = DELETE")
    store = SqliteStore(sqlite_file(f"sqlite:///{db_path}{query}"))
    try:
        store.open_writer(1)
        connection = store._writer_connection()
        with connection.begin():
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == level
    finally:
        store.dispose()


def test_connection_that_stays_below_full_is_refused(db_path: Path) -> None:
    """Whatever a caller of the engine asks for: what SQLite then runs with is read back."""
    engine = SqliteFile(db_path, "NORMAL").engine(writes=True)
    with pytest.raises(DatabaseRefusedError, match="synchronous=1, below FULL"):
        engine.connect()
    engine.dispose()


def test_readers_cannot_write(db_path: Path) -> None:
    engine = parse_database_url(f"sqlite:///{db_path}").engine(writes=False)
    try:
        with engine.connect() as connection, pytest.raises(Exception, match="attempt to write a readonly database"):
            connection.exec_driver_sql("DELETE FROM payment")
    finally:
        engine.dispose()


def test_file_that_vanishes_after_it_was_opened_is_not_made_anew(db_path: Path) -> None:
    store = open_store(f"sqlite:///{db_path}")
    db_path.unlink()
    try:
        with pytest.raises(StoreUnavailableError):
            store.open_writer(1)
    finally:
        store.dispose()
    assert not db_path.exists()
