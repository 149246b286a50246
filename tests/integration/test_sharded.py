"""The store's contract, and every statement that paycore sends, on tables that are spread over shards."""

from __future__ import annotations

import functools
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Index, PrimaryKeyConstraint, UniqueConstraint, event
from sqlalchemy.schema import ColumnCollectionConstraint

from paycore.domain.audit import AuditKind
from paycore.domain.ids import MAX_INT64
from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome
from paycore.jobs.auditor import Auditor
from paycore.store import proof_orders, tables
from paycore.store.proof_orders import OrderKey
from paycore.store.protocol import WriteTransaction
from paycore.store.schema import open_store
from paycore.usecases.close import InsertClosed
from paycore.usecases.health import Heartbeat
from paycore.usecases.keys import ByPaymentId
from paycore.usecases.warm import warm
from paycore.usecases.writer import UnindexedUnit
from tests.contract.test_store import *  # noqa: F403 - the whole suite, with the database below
from tests.support.bank import Street, a_town
from tests.support.books import run
from tests.support.clock import ManualClock
from tests.support.core import VALIDITY_MS, Core, check_money_rules, open_attempt
from tests.support.faults import open_folder
from tests.support.planting import PLANTS, prepare
from tests.support.postgres import connected, own_server
from tests.support.sharded import SHARDS, SPREAD_BY, broken_rule, empty_sharded, sharded_postgres
from tests.support.whole_work import do_everything


@functools.cache
def _database() -> str:
    return sharded_postgres()


@pytest.fixture  # type: ignore[no-redef]  # in place of the contract's
def url(tmp_path: Path) -> str:
    """An empty database whose tables are spread."""
    del tmp_path
    return empty_sharded(_database())


@pytest.fixture(scope="module", autouse=True)
def sent() -> Iterator[set[str]]:
    """Every statement that this module's tests have sent to the spread tables so far."""
    found: set[str] = set()

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.split(maxsplit=1)[0] in {"SELECT", "INSERT", "UPDATE", "DELETE", "WITH"}:
            found.add(" ".join(statement.split()))

    # What the migration says is said before the tables are spread.
    _database()
    event.listen(Engine, "before_cursor_execute", note)
    yield found
    event.remove(Engine, "before_cursor_execute", note)


def test_tables_are_spread_and_no_key_lacks_the_column_that_they_are_spread_by(url: str) -> None:
    """PostgreSQL refuses to make such a key at all, so the tables' being there is most of the proof."""
    assert {name: column for name, column in SPREAD_BY.items() if column != "payment_id"} == {
        "merchant_order": "merchant_id",
        "quarantine": "quarantine_id",
    }
    with connected(url) as connection:
        spread = connection.execute(
            "SELECT relname, (SELECT count(*) FROM pg_inherits WHERE inhparent = pg_class.oid) FROM pg_class"
            " WHERE relkind = 'p'"
        ).fetchall()
        keys = connection.execute(
            "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE contype IN ('p', 'u', 'x') AND conparentid = 0 AND connamespace = 'public'::regnamespace"
        ).fetchall()
        foreign = connection.execute("SELECT count(*) FROM pg_constraint WHERE contype = 'f'").fetchone()
    assert dict(spread) == dict.fromkeys(SPREAD_BY, SHARDS)
    for table, definition in keys:
        if table in SPREAD_BY:
            assert definition.startswith(f"PRIMARY KEY ({SPREAD_BY[table]}"), definition
    assert foreign == (0,)


def test_metadata_has_no_unique_rule_that_does_not_begin_with_the_column_of_its_table() -> None:
    for name, column in SPREAD_BY.items():
        table = tables.METADATA.tables[name]
        rules: list[ColumnCollectionConstraint | Index] = [index for index in table.indexes if index.unique]
        rules += [one for one in table.constraints if isinstance(one, (PrimaryKeyConstraint, UniqueConstraint))]
        for rule in rules:
            assert next(iter(rule.columns)).name == column, rule
        assert not table.foreign_keys


class LookForRefunds(UnindexedUnit):
    """What the refunder asks and leases before it talks to a channel."""

    def __init__(self, now_ms: int) -> None:
        self._now_ms = now_ms

    def apply(self, transaction: WriteTransaction) -> None:
        (due, *_) = transaction.claim_refunds(range(16), self._now_ms, self._now_ms + 1_000, "token", 10)
        assert transaction.update_refund_try(due.last_try, lease_token="token")


async def tell_everything(core: Core, clock: ManualClock) -> None:
    """The writes and reads of the use cases, over payments that lie on every shard."""
    ids = [await core.make_payment("bank_a", "bank_b") for _ in range(12)]
    core.forget()
    words = [core.word(payment_id) for payment_id in ids[:6]]
    words += [core.word(payment_id, 2, "T2") for payment_id in ids[:3]]
    words += [core.failure(ids[6]), core.failure(ids[7]), core.word(ids[11] + 99), core.word(ids[0], 1, "T9")]
    outcomes = [verdict.outcome for verdict in await core.notify_many(*words)]
    assert outcomes[:9] == [NotifyOutcome.ACCEPTED] * 6 + [NotifyOutcome.DUPLICATE] * 3
    closable = await core.make_payment(states={1: AttemptState.CLOSED})
    await core.writer.run(InsertClosed(closable, CloseReason.MERCHANT, core.registry.code))
    await core.writer.run(open_attempt(core, "sharded"))
    clock.advance(VALIDITY_MS + 1)
    # Late beside a live attempt, then the first of a payment that holds excess.
    await core.notify_many(core.word(ids[8], 1), core.word(ids[9], 1))
    await core.notify_many(core.word(ids[8], 2, "T2", paid_at_ms=clock.now_ms() - VALIDITY_MS))
    await core.writer.run(LookForRefunds(clock.now_ms()))
    await core.writer.run(Heartbeat())
    for payment_id in (ids[0], ids[8]):
        assert (await core.query.find(ByPaymentId(payment_id))).record.outcome
    assert core.store.due_refund_slices(clock.now_ms() + 9_000, core.registry.codes)
    assert core.store.backlog().quarantine_open == 2
    warm(core.store, core.index, core.registry.codes, 1_000)


async def test_every_statement_of_every_use_case_obeys_the_rules_of_a_sharded_engine(url: str, sent: set[str]) -> None:
    clock = ManualClock()
    with Core(url, clock=clock) as core:
        await tell_everything(core, clock)
        check_money_rules(core.snapshot())
    broken = {statement: rule for statement in sent if (rule := broken_rule(statement))}
    assert broken == {}
    for needed in ("FOR NO KEY UPDATE", "FROM unnest(", "INSERT INTO quarantine", "INSERT INTO excess_payment", "JOIN"):
        assert any(needed in statement for statement in sent), f"the scenario sent no {needed}"
    assert sum(any(name in statement for name in SPREAD_BY) for statement in sent) >= 20


@pytest.mark.slow
async def test_every_statement_of_every_job_obeys_the_rules_of_a_sharded_engine(
    url: str, sent: set[str], street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweeps, the audit with a channel's books, examiner, closer, recoverer, ender and refunder."""
    monkeypatch.setattr(proof_orders, "is_sharded", lambda _: True)
    sent.clear()
    async with a_town(url, street) as town:
        await do_everything(town, url)
        # What agrees is counted; only where something does not, rows are asked for.
        run(url, "DELETE FROM merchant_order WHERE payment_id = (SELECT max(payment_id) FROM payment)")
        run(url, "DELETE FROM payment WHERE payment_id = (SELECT min(payment_id) FROM payment)")
        look = town.core.store.read
        assert len(look(lambda connection: proof_orders.prove_payments(connection, 0, MAX_INT64))) == 1
        assert len(look(lambda connection: proof_orders.prove_orders(connection, OrderKey(), 100))[0]) == 1
    broken = {statement: rule for statement in sent if (rule := broken_rule(statement))}
    assert broken == {}
    for name in SPREAD_BY:
        assert any(name in statement for statement in sent), f"no job sent anything about {name}"


LOOKED_UP = {AuditKind.PAYMENT_WITHOUT_ORDER, AuditKind.ORDER_NAMES_NO_PAYMENT, AuditKind.QUERIED_PAID_UNJUDGED}
"""What is told by two tables that lie apart."""


async def test_audit_on_lookups_finds_every_planted_break_that_joins_find(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_orders, "is_sharded", lambda _: True)
    with Core(url, clock=ManualClock()) as core:
        plants = {name: plant for name, plant in PLANTS.items() if plant.audit in LOOKED_UP}
        assert {plant.audit for plant in plants.values()} == LOOKED_UP
        await prepare(core, len(plants))
        expected: Counter[tuple[AuditKind, int]] = Counter()
        for name, plant in plants.items():
            expected[plant.audit, plant.apply(url)] += 1
            for range_rows in (7, 1_000):
                auditor = Auditor(store=core.store, clock=core.clock, metrics=core.metrics, range_rows=range_rows)
                found = Counter((one.kind, one.payment_id) for one in (await auditor.audit()).violations)
                assert found == expected, name


def test_engine_that_spreads_tables_is_known_by_its_extension(tmp_path: Path) -> None:
    """An extension of that name without anything in it stands in for it."""
    with own_server() as own, open_folder() as folder:
        extensions = folder / "extension"
        extensions.mkdir(mode=0o755)
        for name, content in (("citus.control", "default_version = '1'\n"), ("citus--1.sql", "")):
            (extensions / name).write_text(content)
        own.stop(signal.SIGINT)
        own.start(f"extension_control_path=$system:{folder}")
        store = open_store(own.fresh_database())
        assert not store.read(proof_orders.is_sharded)
        store.dispose()
        url = own.fresh_database()
        with connected(url) as connection:
            connection.execute("CREATE EXTENSION citus")
        store = open_store(url)
        assert store.read(proof_orders.is_sharded)
        store.dispose()


BROKEN = [
    "SELECT 1 FROM payment WHERE payment_id = ANY (%s) FOR UPDATE",
    "UPDATE channel_order SET state = %s WHERE state = %s",
    "UPDATE payment SET payment_id = %s WHERE payment_id = %s",
    "DELETE FROM payment_outcome WHERE channel_trade_no = %s",
    "INSERT INTO refund (payment_id) SELECT payment_id FROM excess_payment",
    "INSERT INTO refund (payment_id) SELECT payment_id FROM unnest(%s) JOIN excess_payment USING (payment_id)",
    "INSERT INTO payment (payment_id) VALUES (%s) ON CONFLICT (merchant_order_no) DO NOTHING",
    "INSERT INTO payment (payment_id) VALUES (%s) ON CONFLICT DO NOTHING",
    "INSERT INTO quarantine (a) VALUES (1) ON CONFLICT (quarantine_id) DO UPDATE SET quarantine_id = %s",
    "SELECT 1 FROM payment JOIN merchant_order ON merchant_order.merchant_id = payment.merchant_id",
    "SELECT 1 FROM payment JOIN refund ON true",
    "WITH few AS (SELECT refund.attempt FROM refund) SELECT 1 FROM few JOIN payment ON payment_id = few.attempt",
    "SELECT (SELECT max(payment_id) FROM payment)",
    "SELECT r.refund_no, EXISTS (SELECT 1 FROM refund_try t WHERE t.payment_id = r.payment_id) FROM refund r",
    (
        "SELECT 1 FROM payment p WHERE coalesce((SELECT m.payment_id FROM merchant_order m WHERE m.merchant_id ="
        " p.merchant_id), 0) <> p.payment_id"
    ),
    "SELECT 1 FROM queried_paid q WHERE NOT EXISTS (SELECT 1 FROM quarantine k WHERE k.payment_id = q.payment_id)",
    (
        "WITH q AS NOT MATERIALIZED (SELECT * FROM queried_paid WHERE payment_id > %s) SELECT 1 FROM q WHERE EXISTS"
        " (SELECT 1 FROM quarantine k WHERE k.payment_id = q.payment_id)"
    ),
    "SELECT 1 FROM refund_try t WHERE (SELECT count(*) FROM refund_result f WHERE f.payment_id = t.payment_id) < 2",
    (
        "SELECT 1 FROM payment p WHERE EXISTS (SELECT 1 FROM refund r WHERE r.payment_id = p.payment_id)"
        " AND EXISTS (SELECT 1 FROM refund r WHERE r.attempt = 1)"
    ),
    (
        "SELECT 1 FROM refund r LEFT JOIN (SELECT t.refund_no FROM refund_try t GROUP BY t.refund_no) AS n"
        " ON n.refund_no = r.refund_no"
    ),
    "SELECT payment_id FROM payment UNION ALL SELECT p.payment_id FROM payment p JOIN refund r ON r.attempt = p.amount",
    "WITH won AS (INSERT INTO payment_outcome VALUES (%s) RETURNING 1) SELECT * FROM won",
]


FINE = [
    (
        "WITH few AS (SELECT DISTINCT refund.payment_id AS payment_id FROM refund) SELECT 1 FROM few JOIN payment"
        " ON payment.payment_id = few.payment_id"
    ),
    (
        "WITH e AS NOT MATERIALIZED (SELECT * FROM excess_payment WHERE payment_id > %s), o AS NOT MATERIALIZED"
        " (SELECT * FROM payment_outcome WHERE payment_id > %s), k AS (SELECT * FROM refund) SELECT e.attempt, o.state"
        " FROM e LEFT JOIN o ON o.payment_id = e.payment_id"
    ),
    (
        "SELECT 1 FROM refund AS r LEFT JOIN (SELECT t.payment_id, max(t.seq) AS newest FROM refund_try t GROUP BY"
        " t.payment_id) AS n ON n.payment_id = r.payment_id"
    ),
    (
        "SELECT min(bound) FROM (SELECT * FROM (SELECT payment_id AS bound FROM payment LIMIT 1) AS a UNION ALL"
        " SELECT * FROM (SELECT payment_id FROM refund LIMIT 1) AS b) AS bounds"
    ),
    "SELECT count(*) FROM unnest(CAST(%s AS bigint[])) AS told (a) JOIN payment AS m ON m.payment_id = told.a",
    (
        "SELECT 1 FROM payment p WHERE EXISTS (SELECT 1 FROM refund r WHERE r.payment_id = p.payment_id AND NOT EXISTS"
        " (SELECT 1 FROM refund_try t WHERE t.payment_id = r.payment_id))"
    ),
]


@pytest.mark.parametrize("statement", FINE)
def test_statement_that_reads_shard_by_shard_is_fine(statement: str) -> None:
    assert broken_rule(statement) is None


@pytest.mark.parametrize("statement", BROKEN)
def test_statement_that_no_sharded_engine_runs_is_told(statement: str) -> None:
    assert broken_rule(statement) is not None
