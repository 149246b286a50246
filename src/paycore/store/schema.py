"""Which version of the schema a database has, and how to bring it up."""

import pathlib
import sqlite3

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from paycore.store.engine import DatabaseRefusedError, SqliteFile, parse_database_url
from paycore.store.sqlite import SqliteStore

_MIGRATIONS = pathlib.Path(__file__).parent / "migrations"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    return config


def newest_version() -> str:
    """The version that this paycore writes."""
    version = ScriptDirectory.from_config(_config()).get_current_head()
    assert version is not None, "at least one migration is shipped"
    return version


def migrate(url: str) -> tuple[str | None, str]:
    """Bring a database up, creating the file where there is none; return its version before and after.

    Raises DatabaseRefusedError. Two processes may run it at once: the second waits and finds nothing to do.
    """
    file = parse_database_url(url)
    engine = file.engine(writes=True, create=True)
    try:
        with engine.connect() as connection, connection.begin():
            before = _version(connection)
            _refuse_unknown(file, before)
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return before, newest_version()
    except (DBAPIError, sqlite3.Error) as error:
        raise _refusal(file, error) from error
    finally:
        engine.dispose()


def open_store(url: str) -> SqliteStore:
    """Open a database for serving. Raises DatabaseRefusedError where it is missing, damaged or of another version."""
    file = parse_database_url(url)
    if not file.path.exists():
        raise DatabaseRefusedError(f"{file.path}: no such database; run: paycore migrate --db {url}")
    engine = file.engine(writes=True)
    try:
        with engine.connect() as connection:
            version = _version(connection)
    except (DBAPIError, sqlite3.Error) as error:
        raise _refusal(file, error) from error
    finally:
        engine.dispose()
    _refuse_unknown(file, version)
    if version != newest_version():
        raise DatabaseRefusedError(
            f"{file.path}: schema version {version or 'none'}, this paycore needs {newest_version()};"
            f" run: paycore migrate --db {url}"
        )
    return SqliteStore(file)


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_unknown(file: SqliteFile, version: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if version is not None and version not in known:
        raise DatabaseRefusedError(
            f"{file.path}: schema version {version} is newer than this paycore ({newest_version()});"
            " install the paycore that wrote it"
        )


def _refusal(file: SqliteFile, error: DBAPIError | sqlite3.Error) -> DatabaseRefusedError:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        advice = "not a sound SQLite database; restore it from a backup"
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        advice = "another process holds it; try again when that has ended"
    elif code == sqlite3.SQLITE_CANTOPEN:
        advice = "cannot be opened; check that its folder exists and may be written"
    elif code == sqlite3.SQLITE_READONLY:
        advice = "is read-only; make the file and its folder writable"
    else:
        advice = "cannot be used"
    return DatabaseRefusedError(f"{file.path}: {advice} ({cause})")
