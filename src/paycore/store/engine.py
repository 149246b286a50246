"""Opens databases, and refuses those that would lose what was acknowledged.

A notification is acknowledged only once it is durable (R3), so a store whose commits may vanish with the
machine is no store: in-memory SQLite, journals other than WAL, and synchronous below FULL are refused.
"""

import pathlib
import sqlite3
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, QueuePool

BUSY_TIMEOUT_MS = 1_000
"""How long SQLite itself waits for another connection's write to end."""

_SYNCHRONOUS_LEVELS = {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}
_FULL = 2


class DatabaseRefusedError(Exception):
    """The database cannot be used; the message is one line that says why and what to do."""


class SqliteFile:
    """A SQLite file with the durability it is opened with."""

    def __init__(self, path: pathlib.Path, synchronous: str) -> None:
        self.path = path
        self.synchronous = synchronous

    def identity(self) -> tuple[int, int] | None:
        """Tell which file the path names now; None when it names none."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def engine(self, *, writes: bool, create: bool = False) -> Engine:
        """Return an engine. A writing one begins each transaction IMMEDIATE, so what it reads stays true."""
        engine = create_engine(
            "sqlite://",
            creator=lambda: self._connect(writes=writes, create=create),
            poolclass=NullPool if writes else QueuePool,
        )
        begin = "BEGIN IMMEDIATE" if writes else "BEGIN"

        @event.listens_for(engine, "begin")
        def _begin(connection: Any) -> None:
            connection.exec_driver_sql(begin)

        return engine

    def _connect(self, *, writes: bool, create: bool) -> sqlite3.Connection:
        mode = "rwc" if create else "rw"
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=BUSY_TIMEOUT_MS / 1000,
            # Transactions are begun by the listener above, never by the driver.
            isolation_level=None,
            # Pool and writer hand a connection from thread to thread, one at a time.
            check_same_thread=False,
        )
        try:
            self._prepare(connection, writes=writes)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection, *, writes: bool) -> None:
        if not writes:
            connection.execute("PRAGMA query_only = ON")
            return
        (journal_mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if journal_mode != "wal":
            raise DatabaseRefusedError(
                f"{self.path}: this file system gives SQLite journal_mode {journal_mode}, not WAL;"
                " put the database on a local disk"
            )
        connection.execute(f"PRAGMA synchronous = {self.synchronous}")
        (level,) = connection.execute("PRAGMA synchronous").fetchone()
        if level < _FULL:
            raise DatabaseRefusedError(f"{self.path}: SQLite runs with synchronous={level}, below FULL")


def parse_database_url(text: str) -> SqliteFile:
    """Read ``sqlite:///FILE[?synchronous=FULL|EXTRA]``. Raises DatabaseRefusedError for anything that is weaker."""
    try:
        url = make_url(text)
    except ArgumentError:
        raise DatabaseRefusedError(f"not a database URL: {text!r}; for example sqlite:///paycore.db") from None
    if url.get_backend_name() != "sqlite":
        raise DatabaseRefusedError(f"{url.get_backend_name()} is not supported; use sqlite:///FILE")
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        raise DatabaseRefusedError(
            "an in-memory database forgets acknowledged payments; use a file: sqlite:///paycore.db"
        )
    return SqliteFile(pathlib.Path(str(url.database)), _durability(url))


def _durability(url: URL) -> str:
    options = {name.lower(): str(value).upper() for name, value in url.query.items()}
    synchronous = options.pop("synchronous", "FULL")
    journal_mode = options.pop("journal_mode", "WAL")
    if journal_mode != "WAL":
        raise DatabaseRefusedError(
            f"journal_mode={journal_mode} is refused: readers would block the writer; leave it out (WAL)"
        )
    if _SYNCHRONOUS_LEVELS.get(synchronous, 0) < _FULL:
        raise DatabaseRefusedError(
            f"synchronous={synchronous} is refused: a power cut would lose acknowledged payments;"
            " leave it out (FULL) or use EXTRA"
        )
    if options:
        raise DatabaseRefusedError(f"unknown option in the database URL: {', '.join(sorted(options))}")
    return synchronous
