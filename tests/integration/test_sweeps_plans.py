"""What the sweeper asks in each pass is answered from indexes, however much there is, and holds on a sharded engine."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from paycore.bench.payments import Lot
from paycore.domain.verdicts import NotifyOutcome
from tests.support.books import put_lot, run
from tests.support.clock import ManualClock
from tests.support.core import Core
from tests.support.databases import is_postgresql, make_database
from tests.support.planted_rows import insert
from tests.support.postgres import connected
from tests.support.sharded import broken_rule
from tests.support.sweeping import Sweeps

OLD_PAYMENTS = 20_000
OLD_EXCESS = 2_000
SMALL = ("sweep_mark", "sweep_pending", "lease", "json_each")
"""What is read whole: the marks are the living writers' alone, few payments wait, and a list is what was asked for."""

COMPARED = (
    "payment",
    "channel_order",
    "payment_outcome",
    "excess_payment",
    "refund",
    "refund_try",
    "refund_result",
    "queried_paid",
)
"""What a full pass walks over, part by part."""

ENDS = "SELECT (SELECT min(payment.payment_id)"
"""How a full pass asks for the least and the greatest payment: the one exception, named in docs/scaling.md."""

Sent = list[tuple[str, Any]]


@contextmanager
def noted() -> Iterator[Sent]:
    """Every statement that is sent while the block runs, with its parameters."""
    sent: Sent = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, many: bool) -> None:
        sent.append((statement, next(iter(parameters), ()) if many else parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(Engine, "before_cursor_execute", note)


LARGE = (
    "payment",
    "payment_outcome",
    "channel_order",
    "merchant_order",
    "excess_payment",
    "refund",
    "queried_paid",
    "writer",
)
"""What ``grown`` fills. PostgreSQL rightly reads a table of a page from end to end."""


def plan(url: str, statement: str, parameters: Any, *, prepared: bool = False) -> list[str]:
    """How the database runs a statement, a line a step. prepared: in a transaction that is set to parts of tables."""
    if is_postgresql(url):
        return _postgresql_plan(url, statement, parameters)[1 if prepared else 0]
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
        return [str(row[-1]) for row in file.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]


def _postgresql_plan(url: str, statement: str, parameters: Any) -> tuple[list[str], list[str]]:
    """As it is run now on the tables that are large, on the others where there is another way; and so on all."""
    with connected(url) as connection:
        now = [line for (line,) in connection.execute(f"EXPLAIN {statement}".encode(), parameters)]
        connection.execute("SET enable_seqscan = off")
        grown = [line for (line,) in connection.execute(f"EXPLAIN {statement}".encode(), parameters)]
    return [line for line in now if any(f" on {name} " in line for name in LARGE)] + grown, grown


def whole_reads(lines: list[str]) -> list[str]:
    """The steps that read a whole table, or a whole index."""
    steps = [line.strip().removeprefix("->").strip() for line in lines]
    found = [step for step in steps if step.startswith(("SCAN ", "Seq Scan", "Parallel Seq Scan"))]
    return [step for step in found if not any(name in step for name in SMALL) and "CONSTANT ROW" not in step]


async def grown(url: str, core: Core) -> None:
    """A database with a past: many payments, excess and refunds of writers that died long ago."""
    put_lot(url, Lot(core.clock.now_ms() - 86_400_000, OLD_PAYMENTS, 7, paid=True))
    template = insert("excess_payment", 0, payment_id="{id}", attempt=2, channel_trade_no="T", reason=3, amount_minor=1,
                      currency="CNY", received_at_ms=0, source=1)  # fmt: skip
    refund = insert("refund", 0, payment_id="{id}", refund_no="X02", attempt=2, channel_trade_no="T", amount_minor=1,
                    currency="CNY", reason=3)  # fmt: skip
    queried = insert("queried_paid", 0, payment_id="{id}", attempt=2)
    for statement in (template, refund, queried):
        values = statement.partition(" VALUES ")
        row = values[2].strip("()").replace("'{id}'", "payment_id")
        run(url, f"{values[0]} SELECT {row} FROM payment ORDER BY payment_id LIMIT {OLD_EXCESS}")
    dead = "SELECT payment_id, 0, 0 FROM payment ORDER BY payment_id LIMIT 5000"
    if is_postgresql(url):
        dead = dead.replace("payment_id, 0, 0", "1000000 + row_number() OVER (), 0, 0")
    run(url, f"INSERT INTO writer (writer_no, started_at_ms, seen_at_ms) {dead}")
    if is_postgresql(url):
        with connected(url) as connection:
            connection.execute("ANALYZE")
    else:
        run(url, "ANALYZE")


async def traffic(core: Core) -> None:
    await core.make_payment()
    for _ in range(3):
        payment_id = await core.make_payment("bank_a", "bank_b")
        await core.notify(core.word(payment_id, 1, "FIRST"))
        assert (await core.notify(core.word(payment_id, 2, "SECOND"))).outcome is NotifyOutcome.DUPLICATE


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_incremental_pass_reads_no_table_from_end_to_end(kind: str, tmp_path: Path) -> None:
    url = make_database(kind, tmp_path)
    with Core(url, clock=ManualClock()) as core:
        sweeps = Sweeps(core)
        await sweeps.run()
        await grown(url, core)
        await traffic(core)
        with noted() as sent:
            await sweeps.run()
        assert sweeps.found(), "it looked"
        looked = [(statement, values) for statement, values in sent if statement.startswith("SELECT")]
        for name in ("excess_payment", "refund", "queried_paid", "writer", "payment", "channel_order", "task"):
            assert any(f"FROM {name}" in " ".join(statement.split()) for statement, _ in looked), name
        bad = {" ".join(one.split()): whole_reads(plan(url, one, values)) for one, values in looked}
        assert {one: lines for one, lines in bad.items() if lines} == {}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_full_pass_compares_parts_of_tables_by_their_keys(kind: str, tmp_path: Path) -> None:
    url = make_database(kind, tmp_path)
    with Core(url, clock=ManualClock()) as core:
        await grown(url, core)
        await traffic(core)
        with noted() as sent:
            await Sweeps(core, part=5_000).full()
        looked = {" ".join(one.split()): (one, values) for one, values in sent if one.startswith("SELECT")}
        for name in COMPARED:
            of_range = f"{name}.payment_id BETWEEN"
            assert any(f"FROM {name} WHERE" in one and of_range in one for one in looked), name
        bad = {one: whole_reads(plan(url, *asked, prepared=True)) for one, asked in looked.items()}
        assert {one: lines for one, lines in bad.items() if lines} == {}


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_whole_read_is_seen_where_there_is_one(kind: str, tmp_path: Path) -> None:
    """The control: what the test above would say of a query that reads all there is."""
    url = make_database(kind, tmp_path)
    found = whole_reads(plan(url, "SELECT payment_id FROM excess_payment WHERE amount_minor = 7", ()))
    assert found
    assert all("excess_payment" in line for line in found)


async def test_sweeper_sends_only_what_a_sharded_engine_takes(tmp_path: Path) -> None:
    url = make_database("postgresql", tmp_path)
    with Core(url, clock=ManualClock()) as core, noted() as sent:
        sweeps = Sweeps(core)
        await traffic(core)
        run(url, "DELETE FROM refund_try")
        await core.make_payment("bank_a", validity_ms=-1)
        await sweeps.full()
        await sweeps.run()
        assert sweeps.found()["refund_without_try"] == 3
    words = {statement for statement, _ in sent if statement.split()[0] in {"SELECT", "INSERT", "UPDATE", "DELETE"}}
    broken = {" ".join(one.split()) for one in words if broken_rule(one) is not None}
    assert {one for one in broken if not one.startswith(ENDS)} == set()
