"""Which version of the schema a database has, and how to bring it up."""

import pathlib

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from paycore.store.database import Database, DatabaseRefusedError, cause_of
from paycore.store.engine import parse_database_url
from paycore.store.protocol import Store

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
    """Bring a database up, creating the file where SQLite has none; return its version before and after.

    Raises DatabaseRefusedError. Two processes may run it at once: the second waits and finds nothing to do.
    """
    database = parse_database_url(url)
    engine = database.engine(writes=True, create=True)
    try:
        with engine.connect() as connection, connection.begin():
            database.hold_for_migration(connection)
            before = _version(connection)
            _refuse_unknown(database, before)
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            return before, newest_version()
    except (DBAPIError, database.driver_error) as error:
        raise _refusal(database, error) from error
    finally:
        engine.dispose()


def open_store(url: str) -> Store:
    """Open a database for serving. Raises DatabaseRefusedError where it is missing, damaged or of another version."""
    database = parse_database_url(url)
    if database.is_absent():
        raise DatabaseRefusedError(f"{database.name}: no such database; run: paycore migrate --db {database.url}")
    engine = database.engine(writes=True)
    try:
        with engine.connect() as connection:
            version = _version(connection)
    except (DBAPIError, database.driver_error) as error:
        raise _refusal(database, error) from error
    finally:
        engine.dispose()
    _refuse_unknown(database, version)
    if version != newest_version():
        raise DatabaseRefusedError(
            f"{database.name}: schema version {version or 'none'}, this paycore needs {newest_version()};"
            f" run: paycore migrate --db {database.url}"
        )
    return database.open_store()


def _version(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_unknown(database: Database, version: str | None) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if version is not None and version not in known:
        raise DatabaseRefusedError(
            f"{database.name}: schema version {version} is newer than this paycore ({newest_version()});"
            " install the paycore that wrote it"
        )


def _refusal(database: Database, error: Exception) -> DatabaseRefusedError:
    cause = cause_of(error)
    # A driver's message may go over several lines.
    said = " ".join(str(cause).split())
    return DatabaseRefusedError(f"{database.name}: {database.advice(cause)} ({said})")
