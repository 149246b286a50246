"""Tasks and leases: what repair has to come back to, and who works on which share of it.

Functions over a connection whose transaction the caller owns; the same for every database.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    tuple_,
    union_all,
    update,
)

from paycore.domain.ids import SLICES
from paycore.store import tables
from paycore.store.rows import TaskRow

_TASK_KEY = ("payment_id", "kind", "attempt")
_AS_READ = (*_TASK_KEY, "next_at_ms", "looks")
_IN_ORDER = ("next_at_ms", "payment_id", "attempt")


def due_task_slices(connection: Connection, kind: int, now_ms: int) -> list[int]:
    """The shares of the payments that have a task of a kind that is due."""
    task = tables.task
    return slices_with(connection, task, lambda slice_: _due(kind, slice_, now_ms))


def slices_with(connection: Connection, table: Table, condition: Callable[[int], ColumnElement[bool]]) -> list[int]:
    """The shares in which a table has a row that fulfils a condition of the share."""
    # One look for each share: the index answers it whatever else lies there.
    looks = [select(literal(slice_)).where(exists(select(table.c.slice).where(condition(slice_)))) for slice_ in _ALL]
    return sorted(connection.execute(union_all(*looks)).scalars())


_ALL = range(SLICES)


def _due(kind: int, slice_: int, now_ms: int) -> ColumnElement[bool]:
    task = tables.task
    return and_(task.c.kind == kind, task.c.slice == slice_, task.c.next_at_ms <= now_ms)


def due_tasks(
    connection: Connection, kind: int, slice_: int, now_ms: int, limit: int, after: TaskRow | None = None
) -> list[TaskRow]:
    """Tasks of one kind and share that are due, longest due first; those behind ``after`` in this order."""
    task = tables.task
    statement = select(task).where(_due(kind, slice_, now_ms)).order_by(*(task.c[name] for name in _IN_ORDER))
    if after is not None:
        # The first column alone bounds the index; the whole key tells where in it the last page ended.
        place = tuple_(*(task.c[name] for name in _IN_ORDER)) > tuple_(*(getattr(after, name) for name in _IN_ORDER))
        statement = statement.where(task.c.next_at_ms >= after.next_at_ms, place)
    return [TaskRow(*row) for row in connection.execute(statement.limit(limit))]


def oldest_due_task_ms(connection: Connection, kind: int, now_ms: int) -> int | None:
    """When the longest due task of a kind fell due; None where none is due."""
    task = tables.task
    return oldest(connection, [select(func.min(task.c.next_at_ms)).where(_due(kind, one, now_ms)) for one in _ALL])


def oldest(connection: Connection, looks: Iterable[Select[Any]]) -> int | None:
    """The earliest of the times that each look finds; None where none does."""
    return min((at_ms for at_ms in connection.execute(union_all(*looks)).scalars() if at_ms is not None), default=None)


def insert_or_hasten(insert: Callable[[Table], Any]) -> Any:
    """The insert of a task; where it exists it stays, due at the earlier of the two times."""
    statement = insert(tables.task)
    sooner, stands = statement.excluded.next_at_ms, tables.task.c.next_at_ms
    return statement.on_conflict_do_update(
        index_elements=list(tables.task.primary_key.columns),
        set_={"next_at_ms": case((sooner < stands, sooner), else_=stands)},
    )


def _is_as_read() -> ColumnElement[bool]:
    return and_(*(tables.task.c[name] == bindparam(f"read_{name}") for name in _AS_READ))


def _as_read(row: TaskRow) -> dict[str, Any]:
    return {f"read_{name}": getattr(row, name) for name in _AS_READ}


_MOVE = (
    update(tables.task)
    .where(_is_as_read())
    .values({name: bindparam(f"new_{name}") for name in ("next_at_ms", "looks", "last_error")})
)
_DROP = delete(tables.task).where(_is_as_read())


def move_task(connection: Connection, read: TaskRow, row: TaskRow) -> bool:
    """Write when a task is due next, where nobody has moved it meanwhile; False where somebody has."""
    changes = {f"new_{name}": getattr(row, name) for name in ("next_at_ms", "looks", "last_error")}
    return connection.execute(_MOVE, {**_as_read(read), **changes}).rowcount == 1


def drop_tasks(connection: Connection, rows: Iterable[TaskRow]) -> int:
    """Delete the tasks that nobody has moved meanwhile; return how many."""
    values = [_as_read(row) for row in sorted(rows)]
    return connection.execute(_DROP, values).rowcount if values else 0


def _is_ended(now_ms: int, lease_ms: int) -> ColumnElement[bool]:
    """Whether a lease no longer holds for who would ask for one of ``lease_ms``.

    One that ends later than twice that from now was written by a clock far ahead of ours, and counts as ended.
    """
    until_ms = tables.lease.c.lease_until_ms
    return or_(until_ms <= now_ms, until_ms > now_ms + 2 * lease_ms)


def free_slices(connection: Connection, job: str, slices: Sequence[int], now_ms: int, lease_until_ms: int) -> list[int]:
    """Those of these shares that a lease until then could be taken on: nobody holds them for a job."""
    lease = tables.lease
    held = select(lease.c.slice).where(lease.c.job == job, ~_is_ended(now_ms, lease_until_ms - now_ms))
    return sorted(set(slices) - set(connection.execute(held).scalars()))


def claim_slices(
    connection: Connection,
    insert: Callable[[Table], Any],
    job: str,
    slices: Iterable[int],
    now_ms: int,
    lease_until_ms: int,
    token: str,
) -> list[int]:
    """Take shares for a job until ``lease_until_ms``; return those that nobody else holds."""
    lease = tables.lease
    ended = _is_ended(now_ms, lease_until_ms - now_ms)
    claimed = []
    # Ascending, so that two who want the same shares wait for each other in one order.
    for slice_ in sorted(slices):
        new = {"lease_until_ms": lease_until_ms, "lease_token": token}
        statement = insert(lease).values(job=job, slice=slice_, **new)
        taken = statement.on_conflict_do_update(index_elements=[lease.c.job, lease.c.slice], set_=new, where=ended)
        if connection.execute(taken).rowcount == 1:
            claimed.append(slice_)
    return claimed


def release_slices(connection: Connection, job: str, slices: Iterable[int], token: str) -> None:
    """Give shares back that are still held by this token."""
    lease = tables.lease
    own = (lease.c.job == job, lease.c.slice.in_(sorted(slices)), lease.c.lease_token == token)
    connection.execute(update(lease).where(*own).values(lease_until_ms=0, lease_token=""))
