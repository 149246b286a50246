"""A database of the first version is brought up with what lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import text

from paycore.domain.ids import slice_of
from paycore.domain.verdicts import RefundState, TaskKind
from paycore.store import schema
from paycore.store.engine import DatabaseRefusedError, parse_database_url
from tests.support.core import change, read_all
from tests.support.databases import KINDS
from tests.support.postgres import empty_postgres

OPEN, PAID, CLOSED = 250_000_000_000_000_000, 250_000_000_004_194_304, 250_000_000_008_388_608
"""Payments, a millisecond after each other."""

ROWS: Sequence[str] = (
    *(
        f"INSERT INTO payment VALUES ({number}, 'shop', 'n{number}', 500, 'CNY', 'Tea', '', 'd', 9000, 10, 1, 1)"
        for number in (OPEN, PAID, CLOSED)
    ),
    *(
        f"INSERT INTO channel_order VALUES ({number}, {attempt}, 'simbank', 'bank_a', 1, 9000, 2, 10, 'https://b', '',"
        " '', NULL, NULL, 0, '', 10, 1, 1)"
        for number in (OPEN, PAID, CLOSED)
        for attempt in (1, 2)
    ),
    f"INSERT INTO payment_outcome VALUES ({PAID}, 2, 1, 'T1', 500, 'CNY', 10, 10, 1, 0, 0, 10, 1, 2)",
    f"INSERT INTO payment_outcome VALUES ({CLOSED}, 3, 0, '', 0, '', NULL, 10, 0, 0, 1, 10, 1, 2)",
    f"INSERT INTO excess_payment VALUES ({PAID}, 2, 'T2', 2, 500, 'CNY', 10, 10, 1, 10, 1, 2)",
    f"INSERT INTO refund VALUES ({PAID}, 'X02ab', 2, 'T2', 500, 'CNY', 2, 10, 1, 2)",
    f"INSERT INTO refund_try VALUES ({PAID}, 'X02ab', 1, '{PAID}X02ab01', 5, 11, 1, 12, 0, '', 'E', 10, 1, 2)",
    f"INSERT INTO refund_try VALUES ({PAID}, 'X02ab', 2, '{PAID}X02ab02', 2, 13, 4, 14, 15, 't', 'no word', 12, 1, 3)",
    f"INSERT INTO refund_result VALUES ({PAID}, 'X02ab', 1, 5, 'NOT_NOW', 'later', 12, 1, 3)",
)


def migrate_to_first(url: str) -> None:
    engine = parse_database_url(url).engine(writes=True, create=True)
    config = schema._config()
    with engine.connect() as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    engine.dispose()


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = empty_postgres() if request.param == "postgresql" else f"sqlite:///{tmp_path / 'first.db'}"
    migrate_to_first(url)
    for row in ROWS:
        change(url, text(row))
    return url


def of(rows: dict[str, set[Any]], table: str) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, rows[table]))


def test_database_of_the_first_version_keeps_its_rows_and_gets_tasks_for_what_is_open(url: str) -> None:
    assert schema.migrate(url) == ("0001", schema.newest_version())
    rows = read_all(url)
    slice_ = slice_of(PAID)
    assert of(rows, "refund_try") == [
        (PAID, "X02ab", 1, f"{PAID}X02ab01", slice_, RefundState.REFUSED, 11, 1, 12, 0, "", "E", 10, 1, 2),
        (PAID, "X02ab", 2, f"{PAID}X02ab02", slice_, RefundState.UNKNOWN, 13, 4, 14, 15, "t", "no word", 12, 1, 3),
    ]
    assert of(rows, "refund_result") == [(PAID, "X02ab", 1, 5, "NOT_NOW", "later", 12, 1, 3)]
    assert of(rows, "task") == [
        (OPEN, TaskKind.CLOSE, 0, slice_of(OPEN), 9_001, 0, 10, "", 10, 1, 1),
        (OPEN, TaskKind.QUERY, 1, slice_of(OPEN), 10, 0, 10, "", 10, 1, 1),
        (OPEN, TaskKind.QUERY, 2, slice_of(OPEN), 10, 0, 10, "", 10, 1, 1),
    ]
    assert [len(rows[name]) for name in ("payment", "channel_order", "payment_outcome", "excess_payment")] == [
        3,
        6,
        2,
        1,
    ]
    schema.open_store(url).dispose()


def test_database_of_the_first_version_is_refused_by_a_server_until_it_is_migrated(url: str) -> None:
    with pytest.raises(DatabaseRefusedError, match="schema version 0001, this paycore needs"):
        schema.open_store(url)
