"""What every kind of database that a URL can name has in common, and how one is refused."""

from typing import Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from paycore.store.protocol import Store


class DatabaseRefusedError(Exception):
    """The database cannot be used; the message is one line that says why and what to do, and holds no secret."""


class Database(Protocol):
    """A database that a URL names; nothing is opened yet."""

    driver_error: type[Exception]
    """What the driver raises where SQLAlchemy does not wrap it."""

    @property
    def name(self) -> str:
        """What people call it: its file, or user, host and database; never a password."""
        ...

    @property
    def url(self) -> str:
        """Its URL without a password."""
        ...

    def is_absent(self) -> bool:
        """Tell whether there is nothing yet, where that can be told without opening it."""
        ...

    def engine(self, *, writes: bool, create: bool = False) -> Engine:
        """Return an engine. create: make the database where there is none and that is possible."""
        ...

    def hold_for_migration(self, connection: Connection) -> None:
        """Keep other migrations out until the connection's transaction ends."""
        ...

    def advice(self, error: BaseException | None) -> str:
        """Say what a driver's error means and what to do, in a few words."""
        ...

    def open_store(self) -> Store:
        """Return the store; the schema has been checked."""
        ...


def cause_of(error: Exception) -> BaseException | None:
    """The driver's own error."""
    return error.orig if isinstance(error, DBAPIError) else error
