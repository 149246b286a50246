"""Evidence in quarantine: what of it is to be looked at, and the one write that resolves it.

Functions over a connection whose transaction the caller owns; the same for every database. A row is resolved only while
it is as it was read: a word that arrived meanwhile opens it again or keeps it open.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from paycore.store import tables
from paycore.store.rows import QuarantineRow

_CHUNK = 200
"""Rows read whole by one statement: each may hold a raw message of 64 KiB."""


class Place(NamedTuple):
    """A place in the order in which evidence was first seen. The empty id stands before every row of its moment."""

    first_seen_at_ms: int
    quarantine_id: str


class Mark(NamedTuple):
    """How far the evidence of one age has been looked at. round_at_ms: when the round began; 0 without rounds."""

    rung: int
    place: Place
    round_at_ms: int


class Glance(NamedTuple):
    """What tells whether a row is worth reading whole."""

    place: Place
    reason: int
    payment_id: int | None
    attempt: int | None


_table = tables.quarantine
_GLANCE = (_table.c.first_seen_at_ms, _table.c.quarantine_id, _table.c.reason, _table.c.payment_id, _table.c.attempt)


def _after(place: Place) -> ColumnElement[bool]:
    # The first part is what an index on first_seen_at_ms can answer.
    return and_(
        _table.c.first_seen_at_ms >= place.first_seen_at_ms,
        or_(_table.c.first_seen_at_ms > place.first_seen_at_ms, _table.c.quarantine_id > place.quarantine_id),
    )


def open_between(
    connection: Connection, after: Place, until_ms: int, limit: int, *, seen_since_ms: int = 0
) -> list[Glance]:
    """Open rows beyond a place that were first seen until a moment, oldest first.

    seen_since_ms: leaves out those that were last seen before.
    """
    statement = (
        select(*_GLANCE)
        .where(
            tables.QUARANTINE_OPEN,
            _after(after),
            _table.c.first_seen_at_ms <= until_ms,
            _table.c.last_seen_at_ms >= seen_since_ms,
        )
        .order_by(_table.c.first_seen_at_ms, _table.c.quarantine_id)
        .limit(limit)
    )
    return [Glance(Place(*row[:2]), *row[2:]) for row in connection.execute(statement)]


def page(
    connection: Connection, *, after: Place, limit: int, reason: int | None = None, only_open: bool = True
) -> list[QuarantineRow]:
    """Rows beyond a place, oldest first."""
    wanted = [_after(after)]
    if only_open:
        wanted.append(tables.QUARANTINE_OPEN)
    if reason is not None:
        wanted.append(_table.c.reason == reason)
    order = (_table.c.first_seen_at_ms, _table.c.quarantine_id)
    return _rows(connection.execute(select(_table).where(*wanted).order_by(*order).limit(limit)).all())


def by_ids(connection: Connection, quarantine_ids: Collection[str]) -> list[QuarantineRow]:
    """These rows whole, oldest first; those that do not exist are left out."""
    found = []
    ids = sorted(quarantine_ids)
    for start in range(0, len(ids), _CHUNK):
        part = _table.c.quarantine_id.in_(bindparam("ids", ids[start : start + _CHUNK], expanding=True))
        found += _rows(connection.execute(select(_table).where(part)).all())
    return sorted(found, key=lambda row: (row.first_seen_at_ms, row.quarantine_id))


def by_prefix(connection: Connection, prefix: str, limit: int = 2) -> list[QuarantineRow]:
    """Rows whose id begins with these hexadecimal digits."""
    # "g" stands behind every hexadecimal digit.
    begins = and_(_table.c.quarantine_id >= prefix, _table.c.quarantine_id < prefix + "g")
    return _rows(connection.execute(select(_table).where(begins).order_by(_table.c.quarantine_id).limit(limit)).all())


def of_attempt(connection: Connection, payment_id: int, attempt: int, limit: int) -> list[QuarantineRow]:
    """Open rows about one attempt, oldest first."""
    wanted = (tables.QUARANTINE_OPEN, _table.c.payment_id == payment_id, _table.c.attempt == attempt)
    order = (_table.c.first_seen_at_ms, _table.c.quarantine_id)
    return _rows(connection.execute(select(_table).where(*wanted).order_by(*order).limit(limit)).all())


def resolve(connection: Connection, read: QuarantineRow, resolutions: str) -> bool:
    """Close a row and write what was decided about it; False, and nothing is written, where it is not as it was read.

    resolutions: those of ``read`` and one more. Arrivals grow with each word, so one that came meanwhile is seen.
    """
    statement = (
        update(_table)
        .where(
            _table.c.quarantine_id == read.quarantine_id,
            _table.c.is_open == read.is_open,
            _table.c.arrivals == read.arrivals,
            _table.c.last_seen_at_ms == read.last_seen_at_ms,
            _table.c.resolutions == read.resolutions,
        )
        .values(is_open=0, resolutions=resolutions)
    )
    return connection.execute(statement).rowcount == 1


def marks(connection: Connection) -> dict[int, Mark]:
    """How far each rung has come."""
    mark = tables.quarantine_mark
    columns = (mark.c.rung, mark.c.first_seen_at_ms, mark.c.quarantine_id, mark.c.round_at_ms)
    return {row[0]: Mark(row[0], Place(*row[1:3]), row[3]) for row in connection.execute(select(*columns))}


def put_marks(connection: Connection, rows: Sequence[Mark]) -> None:
    """Write how far rungs have come. A mark that steps back costs a second look and nothing else."""
    mark = tables.quarantine_mark
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    for row in sorted(rows):
        values = {
            "first_seen_at_ms": row.place.first_seen_at_ms,
            "quarantine_id": row.place.quarantine_id,
            "round_at_ms": row.round_at_ms,
        }
        new = insert(mark).values(rung=row.rung, **values)
        connection.execute(new.on_conflict_do_update(index_elements=[mark.c.rung], set_=values))


def _rows(found: Sequence[Row[Any]]) -> list[QuarantineRow]:
    return [QuarantineRow._make(row) for row in found]
