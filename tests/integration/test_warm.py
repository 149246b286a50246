"""The warm start: the newest payments are in the index before the first notification, exactly as their rows say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from paycore._dedupe import Index
from paycore.domain.ids import MAX_INT64
from paycore.domain.verdicts import NotifyOutcome
from paycore.usecases import warm as warm_module
from paycore.usecases.judge import index_payment
from paycore.usecases.warm import warm
from tests.support.clock import ManualClock
from tests.support.core import Core
from tests.support.databases import KINDS, make_database

ACCEPTED, DUPLICATE, LATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.LATE


@pytest.fixture(params=KINDS)
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    with Core(make_database(request.param, tmp_path), clock=ManualClock()) as core:
        yield core


async def histories(core: Core) -> list[int]:
    """Payments of every kind that the index tells apart, oldest first."""
    untouched = await core.make_payment()
    several = await core.make_payment("bank_a", "bank_b", "bank_c", "bank_a")
    foreign = await core.make_payment("bank_x", "bank_b")
    huge = await core.make_payment(amount_minor=1 << 50)
    paid = await core.make_payment("bank_a", "bank_b")
    assert (await core.notify(core.word(paid, 2))).outcome == ACCEPTED
    twice = await core.make_payment("bank_a", "bank_b")
    assert (await core.notify(core.word(twice, 1))).outcome == ACCEPTED
    assert (await core.notify(core.word(twice, 2))).outcome == DUPLICATE
    closed, waiting = (
        await core.make_payment(validity_ms=1_000),
        await core.make_payment("bank_a", "bank_b", validity_ms=1_000),
    )
    assert isinstance(core.clock, ManualClock)
    core.clock.advance(5_000)
    assert (await core.notify(core.word(closed))).outcome == LATE
    assert (await core.notify(core.word(waiting))).outcome == LATE
    return [untouched, several, foreign, huge, paid, twice, closed, waiting]


async def test_warm_index_holds_what_each_payments_rows_say(core: Core) -> None:
    ids = await histories(core)
    by_rows, warmed = Index(), Index()
    for payment_id in ids:
        record = core.store.load_record(payment_id)
        assert record is not None
        index_payment(by_rows, record, core.registry.code)
    assert warm(core.store, warmed, core.registry.codes, 1_000) == len(ids)
    for payment_id in ids:
        assert warmed.get(payment_id) == by_rows.get(payment_id) is not None


async def test_warm_start_takes_the_newest_and_stops_at_its_limit(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_module, "CHUNK", 2)
    ids = await histories(core)
    index = Index()
    assert warm(core.store, index, core.registry.codes, 5) == 5
    assert [payment_id in index for payment_id in ids] == [False] * 3 + [True] * 5


async def test_warm_start_stops_where_the_index_is_full(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_module, "CHUNK", 1)
    ids = await histories(core)
    index = Index(max_bytes=1)
    assert warm(core.store, index, core.registry.codes, 1_000) == 0
    assert len(index) == 0
    assert len(ids) > 0


async def test_cold_group_loads_its_payments_as_a_warm_start_does(core: Core) -> None:
    ids = await histories(core)
    core.forget()
    verdicts = await core.notify_many(*(core.word(payment_id, trade_no="other") for payment_id in ids))
    assert verdicts[0].outcome == ACCEPTED
    warmed = Index()
    warm(core.store, warmed, core.registry.codes, 1_000)
    for payment_id in ids:
        assert core.index.get(payment_id) == warmed.get(payment_id)


async def test_columns_of_an_empty_database_are_empty(core: Core) -> None:
    assert core.store.index_columns(MAX_INT64, 10) == ((), (), ())
