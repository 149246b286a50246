"""First outcomes made of rows: the plain form of what the notify path hands to a store as columns."""

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from paycore.store.rows import OutcomeRow

_INT2, _INT8, _TEXT = 21, 20, 25

_OF_ROW = (0, 2, 3, 4, 5, 6, 7, 9)
"""Which columns of an OutcomeRow a store is handed; the others are the same for all."""


class PlainOutcomes:
    """See ``store.protocol.FirstOutcomes``. The rows may come in any order."""

    def __init__(self, rows: Iterable[OutcomeRow]) -> None:
        self._rows = sorted(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def payment_ids(self) -> list[int]:
        """The payments, ascending."""
        return [row.payment_id for row in self._rows]

    def values(self, start: int, stop: int) -> list[Any]:
        """The rows from start to stop, one value after the other."""
        return [row[place] for row in self._rows[start:stop] for place in _OF_ROW]

    def arrays(self) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes]:
        """The columns as binary arrays."""

        def column(place: int, kind: int, encode: Callable[[Any], bytes]) -> bytes:
            return _array(kind, [None if row[place] is None else encode(row[place]) for row in self._rows])

        return (
            column(0, _INT8, _int8),
            column(2, _INT2, _int2),
            column(3, _TEXT, str.encode),
            column(4, _INT8, _int8),
            column(5, _TEXT, str.encode),
            column(6, _INT8, _int8),
            column(7, _INT8, _int8),
            column(9, _INT2, _int2),
        )


def _int8(value: int) -> bytes:
    return struct.pack("!q", value)


def _int2(value: int) -> bytes:
    return struct.pack("!h", value)


def _array(kind: int, items: Sequence[bytes | None]) -> bytes:
    """One dimension from 1 (PostgreSQL's array_send, src/backend/utils/adt/arrayfuncs.c)."""
    parts = [struct.pack("!iiIii", 1, int(None in items), kind, len(items), 1)]
    for item in items:
        parts.append(struct.pack("!i", -1 if item is None else len(item)))
        parts.append(item or b"")
    return b"".join(parts)
