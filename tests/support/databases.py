"""Databases that the integration suites run on: a SQLite file, and PostgreSQL of the newest version.

The store's contract (``tests/contract/test_store.py``) runs on every version; what is above it need not.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import text

from tests.support.core import change, fresh_database
from tests.support.postgres import connected, empty_tables, fresh_postgres

KINDS = ("sqlite", "postgresql")


def is_postgresql(url: str) -> bool:
    """Tell which kind a URL names."""
    return url.startswith("postgresql")


def make_database(kind: str, folder: Path) -> str:
    """Put a migrated, empty database there, of its own; return its URL."""
    return fresh_postgres() if kind == "postgresql" else f"sqlite:///{fresh_database(folder / 'paycore.db')}"


def take_database(kind: str, folder: Path) -> str:
    """The same for one test at a time: on PostgreSQL this process's tests take turns on one, emptied before each."""
    if kind == "sqlite":
        return make_database(kind, folder)
    empty_tables(_shared())
    return _shared()


@functools.cache
def _shared() -> str:
    return fresh_postgres()


def poison(url: str, table: str, trade_no: str) -> None:
    """Make the database refuse one trade number in one table."""
    if is_postgresql(url):
        rule = f"CHECK (channel_trade_no <> '{trade_no}')"
        change(url, text(f"ALTER TABLE {table} ADD CONSTRAINT poison_{trade_no} {rule}"))
        return
    change(
        url,
        text(
            f"CREATE TRIGGER poison_{table}_{trade_no} BEFORE INSERT ON {table}"
            f" WHEN new.channel_trade_no = '{trade_no}' BEGIN SELECT RAISE(ABORT, 'poison'); END"
        ),
    )


def cure(url: str, table: str, trade_no: str) -> None:
    """Undo ``poison``."""
    if is_postgresql(url):
        change(url, text(f"ALTER TABLE {table} DROP CONSTRAINT poison_{trade_no}"))
    else:
        change(url, text(f"DROP TRIGGER poison_{table}_{trade_no}"))


@contextmanager
def held_database(url: str) -> Iterator[None]:
    """Somebody else holds what every outcome needs, until the block ends."""
    if is_postgresql(url):
        with connected(url, autocommit=False) as connection:
            connection.execute("LOCK TABLE payment_outcome IN EXCLUSIVE MODE")
            yield
        return
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        yield
        holder.execute("ROLLBACK")
