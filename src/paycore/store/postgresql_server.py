"""Connects to PostgreSQL, and refuses servers and sessions that would lose what was acknowledged.

The session's settings are the other half of the store's argument: READ COMMITTED is stated with each transaction,
waits for locks end, a process that stands still inside a transaction is cut off while the others still wait for it, and
a peer that is gone is noticed. They are set after connecting, so that no proxy has to pass them on.
"""

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql
from sqlalchemy import URL, Connection, Engine, create_engine, event, text
from sqlalchemy.pool import NullPool, QueuePool

from paycore.store.database import DatabaseRefusedError

if TYPE_CHECKING:
    from paycore.store.postgresql import PostgresqlStore

OLDEST_VERSION = 15

LOCK_TIMEOUT_MS = 1_300
"""How long a statement waits for a row or a key that another transaction holds.

More than the server's deadlock_timeout, 1 s as it comes: of two groups that wait for each other the server ends one,
and the other gets on. Were both to give up at the same moment, they would meet again.
"""

IDLE_IN_TRANSACTION_MS = 3_000
"""After how long the server ends a session that stands still inside a transaction, as a stopped process does.

Less than the writer's MAX_TRIES waits for a lock: the others get on within them.
"""

STATEMENT_TIMEOUT_MS = 30_000
"""How long one statement may take at all."""

MIGRATION_WAIT_MS = 60_000
"""How long a migration waits for another one, or for a table that is in use."""

LOOK_AGAIN_SECONDS = 1.0
"""How long a writer relies on what it has seen of the server's durability, which a reload can switch off."""

_CONNECT_SECONDS = 5
_MIGRATION_LOCK = 0x7061_7963_6F72_65  # "paycore"

_DURABILITY_SWITCHES = ("fsync", "full_page_writes", "synchronous_commit")
"""What must not be off; ``allow_NAME_off=1`` in the URL says that losing acknowledged payments is accepted."""

_SWITCHES_NOW = sql.SQL("SELECT {}").format(
    sql.SQL(", ").join(sql.SQL("current_setting({})").format(name) for name in _DURABILITY_SWITCHES)
)

_COMMIT_LEVELS = ("on", "remote_apply", "remote_write", "local", "off")
"""What ``synchronous_commit`` may be asked for. All but off survive a crash of the primary."""

_PASSED_ON = {
    *("host", "port", "target_session_attrs", "load_balance_hosts", "connect_timeout", "gssencmode"),
    *("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "channel_binding", "require_auth", "passfile"),
}
"""What libpq may be told in the URL."""


class Durability(NamedTuple):
    """What the URL says about it. synchronous_commit: empty where the server's own setting stands."""

    synchronous_commit: str
    allowed_off: frozenset[str]


class PostgresqlServer:
    """A database on a server; see ``store.database.Database``."""

    driver_error: type[Exception] = psycopg.Error

    def __init__(self, url: URL, parameters: dict[str, Any], durability: Durability) -> None:
        self._url = url
        self._parameters = parameters
        self._durability = durability

    @property
    def name(self) -> str:
        """User, host, port and database."""
        bare = self._url._replace(drivername="postgresql", password=None).set(query={})
        return bare.render_as_string().removeprefix("postgresql://")

    @property
    def url(self) -> str:
        """The URL without its password."""
        return self._url._replace(password=None).render_as_string()

    def is_absent(self) -> bool:
        """Only the server knows."""
        return False

    def engine(self, *, writes: bool, create: bool = False) -> Engine:
        """Return an engine: one connection at a time for a writer, a pool of read-only snapshots for readers.

        create: nothing more; the database itself is made by whoever runs the server.
        """
        engine = create_engine(
            "postgresql+psycopg://",
            creator=lambda: self._connect(writes=writes),
            poolclass=NullPool if writes else QueuePool,
            isolation_level="READ COMMITTED" if writes else "REPEATABLE READ",
            use_native_hstore=False,
        )
        if writes:
            event.listen(engine, "begin", _Watch(self))
        # The driver forgets a statement's row count once its cursor is closed.
        return engine.execution_options(preserve_rowcount=True)

    def hold_for_migration(self, connection: Connection) -> None:
        """Keep other migrations out by an advisory lock of the transaction, and give the steps their time."""
        connection.execute(text(f"SET LOCAL lock_timeout = {MIGRATION_WAIT_MS:d}"))
        connection.execute(text("SET LOCAL statement_timeout = 0"))
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK:d})"))

    def advice(self, error: BaseException | None) -> str:
        """Say what a driver's error means and what to do."""
        state = getattr(error, "sqlstate", None)
        if state is None:
            return "cannot be reached; check that the server runs, that it has this database and lets this user in"
        if state == "42501":
            return "this user lacks a right; grant it as docs/operations.md says"
        if state == "55P03":
            return "another process holds it; try again when that has ended"
        if state == "25006":
            return "is read-only: a standby? Name the primary"
        return "cannot be used"

    def open_store(self) -> "PostgresqlStore":
        """Return the store on this database."""
        from paycore.store.postgresql import PostgresqlStore

        return PostgresqlStore(self)

    def _connect(self, *, writes: bool) -> psycopg.Connection[Any]:
        connection = psycopg.connect(**self._parameters, autocommit=True)
        try:
            self._prepare(connection, writes=writes)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: psycopg.Connection[Any], *, writes: bool) -> None:
        version = connection.info.server_version // 10_000
        if version < OLDEST_VERSION:
            raise DatabaseRefusedError(f"{self.name}: PostgreSQL {version} is too old; at least {OLDEST_VERSION}")
        settings = {
            "lock_timeout": str(LOCK_TIMEOUT_MS),
            "statement_timeout": str(STATEMENT_TIMEOUT_MS),
            "idle_in_transaction_session_timeout": str(IDLE_IN_TRANSACTION_MS),
            # The server's side of noticing that this process is gone; without meaning on a Unix socket.
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "2",
            "tcp_keepalives_count": "3",
        }
        calls = sql.SQL(", ").join([sql.SQL("set_config(%s, %s, false)")] * len(settings))
        connection.execute(
            sql.SQL("SELECT {}").format(calls), [part for setting in settings.items() for part in setting]
        )
        if writes:
            # A session's own value stands whatever the server, the role or the database is set to later.
            connection.execute(
                "SELECT set_config('synchronous_commit',"
                " coalesce(nullif(%s, ''), current_setting('synchronous_commit')), false)",
                [self._durability.synchronous_commit],
            )
            self.refuse_forgetful(connection)
        else:
            connection.read_only = True
        connection.autocommit = False

    def refuse_forgetful(self, connection: psycopg.Connection[Any]) -> None:
        """Look at what this session really runs with, whoever set it: configuration, role, database or URL."""
        values = connection.execute(_SWITCHES_NOW).fetchone() or ()
        for name, value in zip(_DURABILITY_SWITCHES, values, strict=True):
            if value == "off" and name not in self._durability.allowed_off:
                raise DatabaseRefusedError(
                    f"{self.name}: the server runs with {name}=off: a crash would lose acknowledged payments;"
                    f" switch it on, or say allow_{name}_off=1 in the URL if that is accepted"
                )


class _Watch:
    """Looks at the server's durability as a transaction begins, once in a while. It belongs to the writer's thread."""

    def __init__(self, server: PostgresqlServer) -> None:
        self._server = server
        self._looked_at = time.monotonic()

    def __call__(self, connection: Connection) -> None:
        if time.monotonic() - self._looked_at < LOOK_AGAIN_SECONDS:
            return
        driver: Any = connection.connection.driver_connection
        try:
            self._server.refuse_forgetful(driver)
        except psycopg.Error:
            if not driver.closed:
                raise
            # The transaction's first statement says that the connection is lost, and is decided again for it.
            return
        self._looked_at = time.monotonic()


def parse_postgresql_url(url: URL) -> PostgresqlServer:
    """Take a URL apart. Raises DatabaseRefusedError for a driver or an option that is not known."""
    if url.drivername not in {"postgresql", "postgresql+psycopg"}:
        raise DatabaseRefusedError(f"{url.drivername} is not supported; use postgresql://USER@HOST/DATABASE")
    if not url.database:
        raise DatabaseRefusedError("the database URL names no database; use postgresql://USER@HOST/DATABASE")
    options = {name: value if isinstance(value, str) else ",".join(value) for name, value in url.query.items()}
    durability = _durability(options)
    unknown = sorted(options.keys() - _PASSED_ON)
    if unknown:
        raise DatabaseRefusedError(f"unknown option in the database URL: {', '.join(unknown)}")
    parameters: dict[str, Any] = {
        "application_name": "paycore",
        "connect_timeout": _CONNECT_SECONDS,
        # A peer that is gone without a word is noticed within seconds, not hours.
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 10_000,
        "client_encoding": "UTF8",
        **options,
        **url.translate_connect_args(database="dbname", username="user"),
    }
    return PostgresqlServer(url, parameters, durability)


def _durability(options: dict[str, str]) -> Durability:
    """Take the options about durability out of the others."""
    allowed = frozenset(name for name in _DURABILITY_SWITCHES if _flag(options, f"allow_{name}_off"))
    level = options.pop("synchronous_commit", "").lower()
    if level and level not in _COMMIT_LEVELS:
        raise DatabaseRefusedError(f"synchronous_commit={level} is not one of {', '.join(_COMMIT_LEVELS)}")
    if level == "off" and "synchronous_commit" not in allowed:
        raise DatabaseRefusedError(
            "synchronous_commit=off is refused: a crash would lose acknowledged payments;"
            " leave it out, or say allow_synchronous_commit_off=1 if that is accepted"
        )
    return Durability(level, allowed)


def _flag(options: dict[str, str], name: str) -> bool:
    value = options.pop(name, "0")
    if value not in {"0", "1"}:
        raise DatabaseRefusedError(f"{name}={value} in the database URL must be 0 or 1")
    return value == "1"
