"""A bank that is down for a day: the sweeper asks it now and then, finds nothing of it missing, and loses nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from paycore.channels.protocol import ChannelTraits
from paycore.domain.verdicts import PaymentState, TaskKind
from paycore.jobs.gate import AT_ONCE
from tests.support.bank import Street, Town, a_town
from tests.support.books import run
from tests.support.core import check_money_rules, fresh_database
from tests.support.planted_rows import insert
from tests.support.sweeping import Sweeps

DAY_MS = 86_400_000
PASSES = 96
"""So many passes, which lie further apart than a channel ever rests."""
CALLS_PER_SECOND = 40
LOST = 30
DOWN = dict.fromkeys(("create", "query", "close", "refund", "query_refund"), True)


@pytest.fixture
async def slow_town(street: Street, tmp_path: Path) -> AsyncIterator[Town]:
    """A core on SQLite that asks the bank no oftener than so often a second."""
    url = f"sqlite:///{fresh_database(tmp_path / 'paycore.db')}"
    traits = ChannelTraits(calls_per_second=CALLS_PER_SECOND)
    async with a_town(url, street, timeout_ms=15_000, traits=traits) as town:
        yield town


async def lost_words(town: Town) -> list[int]:
    """Payments that were paid at the bank, which said so when it was asked; nothing of the money is on record."""
    ids = []
    for _ in range(LOST):
        command = town.order()
        town.plant(command, notify_never=True)
        ids.append((await town.core.pay(command)).payment.payment_id)
        town.user_pays(ids[-1])
    notes = (insert("queried_paid", town.clock.now_ms(), payment_id=one, attempt=1) for one in ids)
    run(town.core.url, *notes, f"DELETE FROM task WHERE kind = {TaskKind.QUERY:d}")
    return ids


def asked(town: Town) -> int:
    """How often the bank was asked anything since its process began."""
    return sum(town.driver.asked("bank_a").values())


async def test_bank_that_is_down_for_a_day_is_asked_now_and_then_and_all_its_money_is_judged_after(
    slow_town: Town,
) -> None:
    town = slow_town
    ids = await lost_words(town)
    sweeps = Sweeps(town.core, full_ms=10 * DAY_MS)
    town.driver.plant_everywhere("bank_a", error_500=DOWN)
    try:
        before = asked(town)
        for _ in range(PASSES):
            town.clock.advance(DAY_MS // PASSES)
            result = await sweeps.run()
        probed = asked(town) - before
        # One of them a pass, and at first so many as are under way at once; never each payment in turn.
        assert PASSES <= probed <= PASSES + 2 * AT_ONCE
        assert (result.put_off, sweeps.pending()) == (LOST, sorted(ids))
        assert result.lag_ms >= DAY_MS - 10 * 60_000
        assert "paid_at_channel" not in sweeps.found()
        for _ in range(30):
            await sweeps.run()
        assert asked(town) - before == probed, "at rest"
    finally:
        town.driver.plant_everywhere("bank_a")
    await comes_back(town, sweeps, ids)


async def comes_back(town: Town, sweeps: Sweeps, ids: list[int]) -> None:
    """The first pass asks once; what follows it works off the rest at the bank's pace."""
    town.clock.advance(DAY_MS)
    before, began_ms = asked(town), town.clock.now_ms()
    await sweeps.run(passes=2)
    spent_ms = town.clock.now_ms() - began_ms
    assert asked(town) - before == LOST
    burst = CALLS_PER_SECOND // 10 + 1
    assert spent_ms * CALLS_PER_SECOND // 1_000 + burst >= LOST
    assert sweeps.found()["paid_at_channel"] == LOST
    assert sweeps.pending() == []
    states = [(await town.file(payment_id)).record.state for payment_id in ids]
    assert set(states) == {PaymentState.PAID}
    check_money_rules(town.core.snapshot())
