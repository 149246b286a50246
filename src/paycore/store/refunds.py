"""Refunds without a final word: which are due, which are overdue, and how a try is moved.

Functions over a connection whose transaction the caller owns; the same for every database.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, false, func, or_, select, update

from paycore.domain.ids import SLICES
from paycore.domain.leases import LONGEST_LEASE_MS
from paycore.store import tables
from paycore.store.protocol import DueRefund
from paycore.store.rows import ChannelOrderRow, RefundRow, RefundTryRow
from paycore.store.tasks import oldest, slices_with

_refund, _tries, _attempt = tables.refund, tables.refund_try, tables.channel_order
_OF_TRY = and_(_refund.c.payment_id == _tries.c.payment_id, _refund.c.refund_no == _tries.c.refund_no)
_OF_REFUND = and_(_attempt.c.payment_id == _refund.c.payment_id, _attempt.c.attempt == _refund.c.attempt)

_CHANGING = ("state", "state_at_ms", "asks", "next_at_ms", "lease_until_ms", "lease_token", "last_error")


def _due(slices: Sequence[int], now_ms: int) -> ColumnElement[bool]:
    return and_(tables.REFUND_UNFINISHED, _tries.c.slice.in_(slices), _tries.c.next_at_ms <= now_ms)


def _is_free(now_ms: int) -> ColumnElement[bool]:
    """``lease_holds``, turned round."""
    return or_(_tries.c.lease_until_ms <= now_ms, _tries.c.lease_until_ms > now_ms + LONGEST_LEASE_MS)


def _due_and_free(
    slices: Sequence[int], now_ms: int, accounts: Collection[tuple[str, str]] | None
) -> ColumnElement[bool]:
    free = and_(_due(slices, now_ms), _is_free(now_ms))
    if accounts is None:
        return free
    of_these = or_(
        false(), *(and_(_attempt.c.channel == name, _attempt.c.account == account) for name, account in accounts)
    )
    return and_(
        free,
        select(_refund.c.payment_id).join(_attempt, _OF_REFUND).where(_OF_TRY, of_these).correlate(_tries).exists(),
    )


def due_refund_slices(
    connection: Connection, now_ms: int, accounts: Collection[tuple[str, str]] | None = None
) -> list[int]:
    """The shares that have a refund try which is due, leased by nobody and at one of these accounts (None: any)."""
    return slices_with(connection, _tries, lambda slice_: _due_and_free([slice_], now_ms, accounts))


def oldest_due_refund_ms(connection: Connection, now_ms: int) -> int | None:
    """When the longest due refund try fell due; None where none is due."""
    looks = [select(func.min(_tries.c.next_at_ms)).where(_due([slice_], now_ms)) for slice_ in range(SLICES)]
    return oldest(connection, looks)


def due_refunds(
    connection: Connection,
    slices: Sequence[int],
    now_ms: int,
    limit: int,
    accounts: Collection[tuple[str, str]] | None = None,
) -> list[DueRefund]:
    """Refund tries of these shares that are due, leased by nobody and at one of these accounts, longest due first.

    Of one share, an index gives them in that order; of several, all that are due are sorted.
    """
    due = _with_all().where(_due_and_free(slices, now_ms, accounts)).order_by(_tries.c.next_at_ms).limit(limit)
    return _read(connection, due)


def untold_refunds(connection: Connection, owed_before_ms: int, now_ms: int, limit: int) -> list[DueRefund]:
    """Refunds that were owed before a time, that nobody works on and that no person was told of."""
    untold = _with_all().where(
        tables.REFUND_UNFINISHED,
        ~tables.REFUND_NEEDS_ATTENTION,
        _is_free(now_ms),
        _refund.c.recorded_at_ms <= owed_before_ms,
    )
    return _read(connection, untold.limit(limit))


def _with_all() -> Select[Any]:
    return select(_refund, _attempt, _tries).select_from(_tries).join(_refund, _OF_TRY).join(_attempt, _OF_REFUND)


def _read(connection: Connection, statement: Select[Any]) -> list[DueRefund]:
    first, second = len(_refund.c), len(_refund.c) + len(_attempt.c)
    return [
        DueRefund(RefundRow(*row[:first]), ChannelOrderRow(*row[first:second]), RefundTryRow(*row[second:]))
        for row in connection.execute(statement)
    ]


_KEY = ("payment_id", "refund_no", "seq")


def _move_try() -> Any:
    as_read = [_tries.c[name] == bindparam(f"read_{name}") for name in (*_KEY, *_CHANGING)]
    return update(_tries).where(*as_read).values({name: bindparam(f"new_{name}") for name in _CHANGING})


_MOVE_TRY = _move_try()


def move_tries(connection: Connection, moves: Iterable[tuple[RefundTryRow, RefundTryRow]]) -> list[RefundTryRow]:
    """Write each second row where the try is still exactly as the first; return those that were written."""
    moved = []
    for read, row in sorted(moves):
        as_read = {f"read_{name}": getattr(read, name) for name in (*_KEY, *_CHANGING)}
        changes = {f"new_{name}": getattr(row, name) for name in _CHANGING}
        # Whoever moves the same try at the same moment waits here for the row, finds it changed and leaves it.
        if connection.execute(_MOVE_TRY, {**as_read, **changes}).rowcount == 1:
            moved.append(row)
    return moved
