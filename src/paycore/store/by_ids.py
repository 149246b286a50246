"""Rows of many payments at once, by the ids of a group: statements compiled once, rows as the driver gives them.

Asked for each group that holds more than first words. Integers and texts need no conversion, so the rows go by
SQLAlchemy's own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ARRAY, BigInteger, BindParameter, Connection, Dialect, Select, Text, any_, bindparam

_IDS_A_STATEMENT = (1, 8, 64, 500)
"""How many ids a statement names where there are no arrays; the last of fewer is named again."""

MOST_IDS = _IDS_A_STATEMENT[-1]
"""Ids that are asked for together: far below every database's limit on parameters."""


class ByIds:
    """A SELECT whose rows have their ``key`` among some ids. It has no other parameters.

    kind: the type of the key.
    """

    def __init__(self, statement: Select[Any], key: Any, kind: type[BigInteger | Text] = BigInteger) -> None:
        self._statement = statement
        self._key = key
        self._kind = kind
        self._compiled: dict[tuple[str, int], str] = {}

    def fetch(self, connection: Connection, ids: Sequence[Any]) -> list[Any]:
        """The rows of all these ids; in the order of the statement for each ``MOST_IDS`` of them."""
        found: list[Any] = []
        for start in range(0, len(ids), MOST_IDS):
            found += self._fetch_some(connection, ids[start : start + MOST_IDS])
        return found

    def _fetch_some(self, connection: Connection, ids: Sequence[Any]) -> list[Any]:
        parameters: Any
        if connection.dialect.name == "postgresql":
            size, parameters = 0, {"ids": list(ids)}
        else:
            size = next(size for size in _IDS_A_STATEMENT if size >= len(ids))
            parameters = (*ids, *[ids[-1]] * (size - len(ids)))
        cursor = connection.exec_driver_sql(self._sql(connection.dialect, size), parameters).cursor
        assert cursor is not None, "a SELECT has a cursor until it is closed"
        rows = cursor.fetchall()
        cursor.close()
        return list(rows)

    def _sql(self, dialect: Dialect, size: int) -> str:
        compiled = self._compiled.get((dialect.name, size))
        if compiled is None:
            among = self._key == any_(self._array()) if size == 0 else self._key.in_(list(_placeholders(size)))
            compiled = str(self._statement.where(among).compile(dialect=dialect))
            self._compiled[dialect.name, size] = compiled
        return compiled

    def _array(self) -> BindParameter[Any]:
        return bindparam("ids", type_=ARRAY(self._kind))


def _placeholders(count: int) -> Iterator[BindParameter[Any]]:
    return (bindparam(f"id_{place}") for place in range(count))
