"""Opens databases, and refuses those that would lose what was acknowledged.

A notification is acknowledged only once it is durable (R3), so a store whose commits may vanish with the
machine is no store: in-memory SQLite, journals other than WAL, and synchronous below FULL are refused. What PostgreSQL
is asked for is in ``store.postgresql_server``.
"""

import pathlib
import sqlite3
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool, QueuePool

from paycore.store.database import Database
from paycore.store.database import DatabaseRefusedError as DatabaseRefusedError  # callers know it from here

if TYPE_CHECKING:
    from paycore.store.sqlite import SqliteStore

_WRITER_CACHE_KIB = 65_536
"""Pages that the writer's connection keeps: what is judged on its rows is mostly young, and then read from memory."""

BUSY_TIMEOUT_MS = 1_000
"""How long SQLite itself waits for another connection's write to end."""

_SYNCHRONOUS_LEVELS = {"OFF": 0, "NORMAL": 1, "FULL": 2, "EXTRA": 3}
_FULL = 2


class SqliteFile:
    """A SQLite file with the durability it is opened with; see ``store.database.Database``."""

    driver_error: type[Exception] = sqlite3.Error

    def __init__(self, path: pathlib.Path, synchronous: str, url: str = "") -> None:
        self.path = path
        self.synchronous = synchronous
        self.url = url or f"sqlite:///{path}"

    @property
    def name(self) -> str:
        """The file."""
        return str(self.path)

    def is_absent(self) -> bool:
        """Tell whether there is no file."""
        return not self.path.exists()

    def hold_for_migration(self, connection: Connection) -> None:
        """Nothing to do: a writing engine's transactions exclude each other."""

    def open_store(self) -> "SqliteStore":
        """Return the store on this file."""
        from paycore.store.sqlite import SqliteStore

        return SqliteStore(self)

    def advice(self, error: BaseException | None) -> str:
        """Say what a driver's error means and what to do."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return "not a sound SQLite database; restore it from a backup"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return "another process holds it; try again when that has ended"
        if code == sqlite3.SQLITE_CANTOPEN:
            return "cannot be opened; check that its folder exists and may be written"
        if code == sqlite3.SQLITE_READONLY:
            return "is read-only; make the file and its folder writable"
        return "cannot be used"

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
        connection.execute(f"PRAGMA cache_size = {-_WRITER_CACHE_KIB}")
        connection.execute(f"PRAGMA synchronous = {self.synchronous}")
        (level,) = connection.execute("PRAGMA synchronous").fetchone()
        if level < _FULL:
            raise DatabaseRefusedError(f"{self.path}: SQLite runs with synchronous={level}, below FULL")


def parse_database_url(text: str) -> Database:
    """Read ``sqlite:///FILE[?synchronous=FULL|EXTRA]`` or ``postgresql://[user[:password]@]host[:port]/database``.

    Raises DatabaseRefusedError for anything that is weaker than what was acknowledged must be.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # What stands before an @ may hold a password.
        shown = text.rpartition("@")[2]
        raise DatabaseRefusedError(f"not a database URL: {shown!r}; for example sqlite:///paycore.db") from None
    if url.get_backend_name() == "postgresql":
        # Imported where it is needed: a SQLite file is opened without the driver.
        from paycore.store.postgresql_server import parse_postgresql_url

        return parse_postgresql_url(url)
    if url.get_backend_name() != "sqlite":
        raise DatabaseRefusedError(
            f"{url.get_backend_name()} is not supported; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        )
    return _sqlite_file(url, text)


def sqlite_file(text: str) -> SqliteFile:
    """The same for a URL that must name a SQLite file."""
    return _sqlite_file(make_url(text), text)


def _sqlite_file(url: URL, text: str) -> SqliteFile:
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        raise DatabaseRefusedError(
            "an in-memory database forgets acknowledged payments; use a file: sqlite:///paycore.db"
        )
    return SqliteFile(pathlib.Path(str(url.database)), _durability(url), text)


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
