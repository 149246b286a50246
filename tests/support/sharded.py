"""A PostgreSQL whose tables are spread as a sharded engine spreads them, and the rules that such an engine sets.

Partitions of one server stand in for the shards of many. PostgreSQL itself then refuses every key that does not hold
the column that its table is spread by; what else a sharded engine refuses (Citus, SQL support and workarounds, read
2026-11) is said by ``broken_rule``.
"""

from __future__ import annotations

import re

from paycore.store import tables
from tests.support.postgres import connected, empty_tables, fresh_postgres
from tests.support.sharded_reads import broken_by_read

SPREAD_BY = {
    table.name: table.primary_key.columns.keys()[0]
    for table in tables.METADATA.sorted_tables
    if table not in (tables.writer, tables.lease, tables.sweep_mark, tables.quarantine_mark)
}
"""Table -> the column that it is spread by. The tables of housekeeping are one for all."""

SHARDS = 4


def sharded_postgres() -> str:
    """Make a migrated, empty database whose tables are spread; return its URL."""
    url = fresh_postgres()
    with connected(url) as connection:
        for name, column in SPREAD_BY.items():
            connection.execute(f"ALTER TABLE {name} RENAME TO whole")
            connection.execute(f"CREATE TABLE {name} (LIKE whole INCLUDING ALL) PARTITION BY HASH ({column})")
            connection.execute("DROP TABLE whole")
            for shard in range(SHARDS):
                part = f"MODULUS {SHARDS}, REMAINDER {shard}"
                connection.execute(f"CREATE TABLE {name}_{shard} PARTITION OF {name} FOR VALUES WITH ({part})")
    return url


def empty_sharded(url: str) -> str:
    """Take every row out; return the URL."""
    empty_tables(url)
    return url


def _named(statement: str) -> set[str]:
    """The spread tables that a statement names."""
    return {name for name in SPREAD_BY if re.search(rf"\b{name}\b(?!\.)", statement)}


def _is_set(statement: str, column: str) -> bool:
    """Whether an UPDATE, or the one of an insert that conflicts, writes a column."""
    match = re.search(r"\bSET\b(.*?)(\bWHERE\b|$)", statement, re.IGNORECASE)
    return match is not None and re.search(rf"(^|,)\s*{column}\s*=", match[1]) is not None


def _is_one_of(statement: str, column: str) -> bool:
    """Whether its WHERE names one value of a column."""
    where = statement.rpartition(" WHERE ")[2] if " WHERE " in statement else ""
    return re.search(rf"\b{column} = (%|\$|:)", where) is not None


def broken_rule(statement: str) -> str | None:
    """Say which rule of a sharded engine a statement breaks; None where it runs there unchanged."""
    statement = " ".join(statement.split())
    verb = statement.partition(" ")[0].upper()
    named = _named(statement)
    if not named:
        return None
    if verb == "WITH" and re.search(r"\b(INSERT|UPDATE|DELETE)\b", statement):
        return "a common table expression writes nothing"
    if re.search(r"\bFOR (NO KEY )?(UPDATE|SHARE)\b", statement) and not _is_one_of(statement, "payment_id"):
        return "rows are locked on one shard at a time"
    if verb in {"UPDATE", "DELETE"} and not _is_one_of(statement, SPREAD_BY[min(named)]):
        return "a write names its shard"
    if any(_is_set(statement, SPREAD_BY[name]) for name in named) and verb in {"UPDATE", "INSERT"}:
        return "the column that a table is spread by is never changed"
    if verb == "INSERT":
        return _broken_by_insert(statement, named)
    return broken_by_read(statement, SPREAD_BY) if verb in {"SELECT", "WITH"} else None


def _broken_by_insert(statement: str, named: set[str]) -> str | None:
    if len(named) > 1 or re.search(r"\bSELECT\b.*\bFROM (?!unnest\()", statement):
        return "an insert reads no spread table"
    conflict = re.search(r"ON CONFLICT(?: \((.*?)\))?", statement)
    (name,) = named
    if conflict and SPREAD_BY[name] not in (conflict[1] or ""):
        return "a conflict is about a key that holds the column that the table is spread by"
    return None
