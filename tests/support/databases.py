"""Databases that the integration suites run on: a SQLite file, and PostgreSQL of the newest version.

The store's contract (``tests/contract/test_store.py``) runs on every version; what is above it need not.
"""

from __future__ import annotations

import functools
from pathlib import Path

from tests.support.core import fresh_database
from tests.support.postgres import empty_tables, fresh_postgres

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
