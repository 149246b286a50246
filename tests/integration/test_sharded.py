"""The store's contract, and every statement that paycore sends, on tables that are spread over shards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Index, PrimaryKeyConstraint, UniqueConstraint, event
from sqlalchemy.schema import ColumnCollectionConstraint

from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome
from paycore.store import tables
from paycore.store.protocol import WriteTransaction
from paycore.usecases.close import InsertClosed
from paycore.usecases.health import Heartbeat
from paycore.usecases.keys import ByPaymentId
from paycore.usecases.warm import warm
from paycore.usecases.writer import UnindexedUnit
from tests.contract.test_store import *  # noqa: F403 - the whole suite, with the database below
from tests.support.clock import ManualClock
from tests.support.core import VALIDITY_MS, Core, check_money_rules, open_attempt
from tests.support.postgres import connected
from tests.support.sharded import SHARDS, SPREAD_BY, broken_rule, empty_sharded, sharded_postgres


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
    assert core.store.due_refund_slices(clock.now_ms() + 9_000, ["resting"])
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
    "WITH won AS (INSERT INTO payment_outcome VALUES (%s) RETURNING 1) SELECT * FROM won",
]


def test_statement_that_reads_shard_by_shard_through_a_subquery_is_fine() -> None:
    few = "WITH few AS (SELECT DISTINCT refund.payment_id AS payment_id FROM refund)"
    assert broken_rule(f"{few} SELECT 1 FROM few JOIN payment ON payment.payment_id = few.payment_id") is None


@pytest.mark.parametrize("statement", BROKEN)
def test_statement_that_no_sharded_engine_runs_is_told(statement: str) -> None:
    assert broken_rule(statement) is not None
