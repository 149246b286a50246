"""A PostgreSQL database that is measured on, and the limit of it: the bare store's rows in binary arrays."""

import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import pq

from paycore.bench.bare_rows import COLUMNS, OF_ROW, groups, outcomes
from paycore.bench.databases import COUNTED, count_rows, count_sql, steps
from paycore.bench.payments import Lot, id_sql, statements
from paycore.bench.result import BenchError, CountError
from paycore.domain.verdicts import CaptureSource, PaymentState
from paycore.store.rows import OutcomeRow, Stamp
from paycore.store.schema import migrate

_SOURCE = "SELECT i, {id} AS payment_id FROM generate_series({first}::bigint, {last}::bigint) AS n (i)"

_TOLD = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_wal_size")
"""What is said of a PostgreSQL server."""


class PostgresqlDatabase:
    """A database without payments; see ``Database``. Raises BenchError where it has some."""

    def __init__(self, url: str) -> None:
        self.url = url
        migrate(url)
        with self._connect() as connection:
            if connection.execute("SELECT 1 FROM payment LIMIT 1").fetchone():
                raise BenchError("the database has payments in it: name an empty one, for what is measured stays in it")

    def write(self, lot: Lot, done: Callable[[int], None]) -> None:
        """See ``Database``. Not made durable at each step: ``settle`` does that."""
        stamp = Stamp(lot.first_ms, lot.node, 1)
        with self._connect() as connection:
            connection.execute("SET synchronous_commit = off")
            for first, end in steps(lot.size):
                source = _SOURCE.format(first=first, last=end - 1, id=id_sql(lot))
                with connection.transaction():
                    for statement in statements(lot, source, stamp):
                        connection.execute(statement.encode())
                done(end)

    def settle(self) -> None:
        with self._connect() as connection:
            connection.execute("VACUUM (ANALYZE)")
            # A user who may not ask for a checkpoint measures with one that comes when it comes.
            with suppress(psycopg.errors.InsufficientPrivilege):
                connection.execute("CHECKPOINT")

    def counts(self) -> dict[str, int]:
        with self._connect() as connection:
            rows = {table: connection.execute(count_sql(table).encode()).fetchone() for table in COUNTED}
        return {table: int(row[0]) for table, row in rows.items() if row}

    def scan(self, query: str) -> int:
        # A named cursor: the server hands the rows over some at a time.
        with self._connect() as connection, connection.transaction(), connection.cursor("scan") as cursor:
            cursor.execute(query.encode())
            return count_rows(cursor.fetchmany)

    def facts(self) -> Mapping[str, str]:
        with self._connect() as connection:
            told = {name: self._setting(connection, name) for name in _TOLD}
        version = told.pop("server_version")
        return {"database": f"PostgreSQL {version}", "settings": ", ".join(f"{k}={v}" for k, v in told.items())}

    @staticmethod
    def _setting(connection: "psycopg.Connection[Any]", name: str) -> str:
        (value,) = connection.execute("SELECT current_setting(%s)", [name]).fetchone() or ("",)
        return str(value)

    def _connect(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(libpq_url(self.url), autocommit=True)


def libpq_url(url: str) -> str:
    """A URL as libpq reads it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)


# ---- PostgreSQL --------------------------------------------------------------------------------------------

# The types of the arrays, as in PostgreSQL's src/include/catalog/pg_type.dat: _int8, _int2, _text.
_INT2, _INT8, _TEXT = 21, 20, 25
_ARRAYS = {_INT2: 1005, _INT8: 1016, _TEXT: 1009}
_KINDS = (_INT8, _INT2, _TEXT, _INT8, _TEXT, _INT8, _INT8, _INT2)
_STAMP = struct.Struct("!q")


def _postgresql_statement() -> bytes:
    names = (
        "payment_id, attempt, channel_trade_no, amount_minor, currency, paid_at_ms, received_at_ms, paid_at_untrusted"
    )
    kinds = {_INT2: "smallint", _INT8: "bigint", _TEXT: "text"}
    arrays = ", ".join(f"${place}::{kinds[kind]}[]" for place, kind in enumerate(_KINDS, start=4))
    return (
        f"INSERT INTO payment_outcome ({COLUMNS})"  # noqa: S608 - no input
        f" SELECT payment_id, {PaymentState.PAID:d}, attempt, channel_trade_no, amount_minor, currency, paid_at_ms,"
        f" received_at_ms, {CaptureSource.NOTIFICATION:d}, paid_at_untrusted, 0, $1::bigint, $2::bigint, $3::bigint"
        f" FROM unnest({arrays}) AS first ({names}) ON CONFLICT (payment_id) DO NOTHING"
    ).encode()


def _array(kind: int, values: list[Any]) -> bytes:
    """One dimension from 1, without NULL (array_send in PostgreSQL's src/backend/utils/adt/arrayfuncs.c)."""
    head = struct.pack("!iiIii", 1, 0, kind, len(values), 1)
    if kind == _TEXT:
        texts = [value.encode() for value in values]
        return head + b"".join(struct.pack("!i", len(text)) + text for text in texts)
    size, letter = (2, "h") if kind == _INT2 else (8, "q")
    return head + struct.pack("!" + f"i{letter}" * len(values), *(part for value in values for part in (size, value)))


def _postgresql_values(group: list[OutcomeRow]) -> list[bytes]:
    columns = zip(_KINDS, OF_ROW, strict=True)
    return [*map(_STAMP.pack, group[0][-3:]), *(_array(kind, [row[place] for row in group]) for kind, place in columns)]


def run_bare(url: str, lot: Lot, size: int) -> float:
    """Insert into a PostgreSQL database; return the seconds that it took."""
    every = [_postgresql_values(group) for group in groups(list(outcomes(lot)), size)]
    kinds = [20, 20, 20, *(_ARRAYS[kind] for kind in _KINDS)]
    binary = [pq.Format.BINARY] * len(kinds)
    inserted = 0
    with psycopg.connect(libpq_url(url), autocommit=True) as connection:
        server = connection.pgconn
        _expect(server.prepare(b"insert", _postgresql_statement(), kinds))
        started_ns = time.perf_counter_ns()
        for values in every:
            # Outside a transaction block a statement is a transaction: begun, made durable and answered in one go.
            inserted += _expect(server.exec_prepared(b"insert", values, binary)).command_tuples or 0
        seconds = (time.perf_counter_ns() - started_ns) / 1e9
    if inserted != lot.size:
        raise CountError(f"{inserted} of {lot.size} outcomes went in")
    return seconds


def _expect(result: "pq.abc.PGresult") -> "pq.abc.PGresult":
    if result.status != pq.ExecStatus.COMMAND_OK:
        raise BenchError(result.error_message.decode())
    return result
