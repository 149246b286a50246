"""A bank that is down for a day, and clocks that jump: nobody is hammered, nothing is doubled, nothing is lost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from paycore.channels.protocol import ChannelTraits, Refunded, RefundOrder
from paycore.domain.verdicts import RefundState
from paycore.jobs.gate import AT_ONCE, ChannelGate
from paycore.jobs.slices import Slices
from tests.support.bank import LEASE_MS, Street, Town, a_town
from tests.support.clock import ManualClock
from tests.support.core import CHANNEL, change, check_money_rules, fresh_database
from tests.support.owed import BANK, Owed, owe, owe_one
from tests.support.simbank import Driver, Receiver, bank_process

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
CALLS_PER_SECOND = 40
OWED = 40
PROBES = 144
"""So many passes, which lie further apart than a channel ever rests."""


@pytest.fixture
async def slow_town(street: Street, tmp_path: Path) -> AsyncIterator[Town]:
    """A core on SQLite that asks the bank no oftener than so often a second."""
    url = f"sqlite:///{fresh_database(tmp_path / 'paycore.db')}"
    traits = ChannelTraits(calls_per_second=CALLS_PER_SECOND)
    async with a_town(url, street, timeout_ms=15_000, traits=traits, retry_ms=5_000) as town:
        yield town


@pytest.fixture
def failing_bank(street: Street) -> Iterator[None]:
    """Bank B answers everything with an error until the test takes that back."""
    operations = ("create", "query", "close", "refund", "query_refund")
    street.driver.plant_everywhere(BANK, error_500=dict.fromkeys(operations, True))
    yield
    street.driver.plant_everywhere(BANK)


def asked(town: Town) -> int:
    """How often bank B was asked anything since its process began."""
    return sum(town.driver.asked(BANK).values())


async def test_bank_that_fails_for_a_day_is_asked_now_and_then_and_gets_the_backlog_at_its_pace(
    slow_town: Town,
) -> None:
    town = slow_town
    every = await owe(town, OWED)
    operations = ("create", "query", "close", "refund", "query_refund")
    town.driver.plant_everywhere(BANK, error_500=dict.fromkeys(operations, True))
    try:
        before = asked(town)
        with capture_logs() as lines:
            for _ in range(PROBES):
                await town.core.refunder.run_once()
                town.clock.advance(DAY_MS // PROBES)
            await town.core.refunder.run_once()
            probed = asked(town) - before
            for _ in range(30):
                await town.core.refunder.run_once()
                town.clock.advance(1_000)
        # One of them a pass, and at first so many as are under way at once; never each refund in turn.
        assert PROBES <= probed <= PROBES + 1 + AT_ONCE
        assert asked(town) - before == probed, "at rest, for a minute each time"
        told = [line["payment_id"] for line in lines if line["event"] == "refund_needs_attention"]
        assert sorted(told) == sorted(owed.payment_id for owed in every)
        assert town.core.store.backlog().refunds_need_attention == OWED
        assert len(town.core.snapshot()["refund_try"]) == OWED, "and none under a second number"
    finally:
        town.driver.plant_everywhere(BANK)
    await drains_at_its_pace(town, every)


async def run_while_more(town: Town) -> int:
    """Make passes until none says that more is due; return how many refunds they finished."""
    done, more = 0, True
    while more:
        result = await town.core.refunder.run_once()
        done, more = done + result.done, result.more
    return done


async def drains_at_its_pace(town: Town, every: list[Owed]) -> None:
    """Let the backlog out, and hold each second of it to the rate, by the bank's own count."""
    town.clock.advance(HOUR_MS)
    seen = [(town.clock.now_ms(), asked(town))]
    draining = asyncio.create_task(run_while_more(town))
    while not draining.done():
        await asyncio.sleep(0.1)
        seen.append((town.clock.now_ms(), asked(town)))
    assert await draining == OWED
    burst = CALLS_PER_SECOND // 10 + 1
    for index, (from_ms, from_count) in enumerate(seen):
        for to_ms, to_count in seen[index + 1 :]:
            # What is counted at one look may have happened while the look before it was under way.
            allowed = burst + (to_ms - from_ms + 200) * CALLS_PER_SECOND // 1_000
            assert to_count - from_count <= allowed, (from_ms, to_ms)
    for owed in every:
        assert list(owed.at_bank().values()) == ["REFUNDED"]
        assert await owed.states() == [(1, RefundState.REFUNDED)]
    check_money_rules(town.core.snapshot())


async def test_refunds_that_a_resting_channel_was_not_asked_about_stay_due_and_unleased(
    slow_town: Town, failing_bank: None
) -> None:
    town = slow_town
    every = await owe_while(town, 30)
    # By the clock of this gate the rest does not end, however long the passes take.
    refunder = town.core.a_refunder(ChannelGate(town.core.registry.traits, ManualClock()))
    result = await refunder.run_once()
    rows = [row for owed in every for row in await owed.tries()]
    untouched = [row for row in rows if row.asks == 0]
    # Those under way when the silence was noticed were asked about; the others were claimed and given back.
    assert len(untouched) >= 10
    assert result.put_off == 30 - len(untouched)
    assert result.lag_ms >= 0
    assert all(row.lease_until_ms == 0 for row in rows)
    assert all(row.next_at_ms <= town.clock.now_ms() for row in untouched)
    before = asked(town)
    for _ in range(3):
        assert (await refunder.run_once())[:2] == (0, 0)
    assert asked(town) == before


async def owe_while(town: Town, count: int) -> list[Owed]:
    """Let refunds be owed by a bank that fails otherwise."""
    town.driver.plant_everywhere(BANK)
    every = await owe(town, count)
    operations = ("refund", "query_refund")
    town.driver.plant_everywhere(BANK, error_500=dict.fromkeys(operations, True))
    return every


async def test_bank_that_is_gone_for_a_day_and_comes_back_refunds_everything_once(
    tmp_path: Path,
) -> None:
    """The bank's process is stopped, and started again at the same address a day later."""
    receiver = Receiver()
    folder = tmp_path / "bank"
    folder.mkdir()
    url = f"sqlite:///{fresh_database(tmp_path / 'paycore.db')}"
    forwarder_url = f"{receiver.url}/notifications"
    try:
        with bank_process(folder, forwarder_url) as bank, Driver(bank.url) as driver:
            address = bank.address
            street = Street(bank, driver, receiver)
            async with a_town(url, street, timeout_ms=15_000) as town:
                owed = [one.payment_id for one in await owe(town, 8)]
        async with a_town(url, street, timeout_ms=15_000) as town:
            for _ in range(48):
                await town.core.refunder.run_once()
                town.clock.advance(HOUR_MS // 2)
            await town.core.refunder.run_once()
            assert town.core.store.backlog().refunds_need_attention == 8
            with bank_process(folder, forwarder_url, "--listen", address) as again, Driver(again.url) as driver:
                town.clock.advance(HOUR_MS)
                assert await run_while_more(town) == 8
                books = driver.http.get("/books", params={"bank": BANK}).json()["banks"][BANK]["orders"]
                assert [order["kept_minor"] for order in books] == [0] * 8
                assert [[one["result"] for one in order["refunds"]] for order in books] == [["REFUNDED"]] * 8
            assert {row.payment_id for row in town.core.snapshot()["refund_result"]} == set(owed)
    finally:
        receiver.close()


# Clocks that jump


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS])
@pytest.mark.parametrize("fault", ["before_it_is_sent", "after_an_unknown_answer", "while_accepted"])
async def test_clock_that_jumps_an_hour_doubles_no_refund_and_takes_no_second_number(
    patient_town: Town, jump_ms: int, fault: str
) -> None:
    town = patient_town
    owed = await owe_one(town)
    if fault == "after_an_unknown_answer":
        owed.plant(error_500_after_doing={"refund": {"value": True, "times": 1}})
        await town.refund()
    if fault == "while_accepted":
        owed.plant(refund_accepted_only={"result": "success", "delay_ms": 10})
        await town.refund()
    town.clock.advance(jump_ms)
    await town.refund(passes=3)
    # What was due before a clock was set back is due again once it is there again, and no later.
    town.clock.advance(max(-jump_ms, 0) + 5_000)
    await town.refund(passes=2)
    assert list(owed.at_bank().values()) == ["REFUNDED"]
    assert await owed.states() == [(1, RefundState.REFUNDED)]
    assert owed.kept_minor() == 0


async def test_refund_whose_holder_died_is_taken_over_after_its_lease_whatever_the_clock_did(
    patient_town: Town,
) -> None:
    """Both leases stand, on the share and on the try; then the clock is an hour back."""
    town = patient_town
    owed = await owe_one(town)
    until_ms = town.clock.now_ms() + LEASE_MS
    change(town.core.url, text(f"UPDATE refund_try SET lease_until_ms = {until_ms}, lease_token = 'dead'"))
    dead = Slices(town.core.store, town.core.writer, town.core.clock, lambda: "dead", LEASE_MS)
    await dead.take("refunder", range(16), most=16).__aenter__()
    town.clock.advance(-HOUR_MS)
    assert (await town.core.refunder.run_once()).done == 0
    # By no more than the jump: the lease ends when the clock is there again.
    town.clock.advance(HOUR_MS - 1_000)
    assert (await town.core.refunder.run_once()).done == 0
    town.clock.advance(LEASE_MS + 2_000)
    assert (await town.core.refunder.run_once()).done == 1
    assert list(owed.at_bank().values()) == ["REFUNDED"]


async def test_refund_that_a_clock_an_hour_ahead_leased_goes_back_at_once(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)
    until_ms = town.clock.now_ms() + HOUR_MS + LEASE_MS
    change(town.core.url, text(f"UPDATE refund_try SET lease_until_ms = {until_ms}, lease_token = 'dead'"))
    assert (await town.core.refunder.run_once()).done == 1
    assert list(owed.at_bank().values()) == ["REFUNDED"]


async def test_clock_that_runs_an_hour_ahead_takes_the_try_over_and_the_money_goes_back_once(
    street: Street, patient_town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    town = patient_town
    owed = await owe_one(town)
    channel = town.core.registry.channel(CHANNEL)
    ask, asked_once, taken_over = channel.query_refund, asyncio.Event(), asyncio.Event()

    async def hear_late(order: RefundOrder) -> Refunded:
        known = await ask(order)
        asked_once.set()
        await taken_over.wait()
        return known

    monkeypatch.setattr(channel, "query_refund", hear_late)
    slow = asyncio.create_task(town.core.refunder.run_once())
    async with asyncio.timeout(20), a_town(town.core.url, street, timeout_ms=15_000) as ahead:
        await asked_once.wait()
        ahead.clock.advance(HOUR_MS)
        assert (await ahead.core.refunder.run_once()).done == 1
    taken_over.set()
    assert (await slow).done == 0
    assert list(owed.at_bank().values()) == ["REFUNDED"]
    assert await owed.states() == [(1, RefundState.REFUNDED)]
    check_money_rules(town.core.snapshot())


async def test_refund_that_another_process_took_over_before_its_turn_came_is_not_sent(
    street: Street, patient_town: Town
) -> None:
    """The lease ends between the question and the turn to send."""
    town = patient_town
    owed = await owe_one(town)
    async with a_town(town.core.url, street, timeout_ms=15_000) as other:

        async def taken_over(_: int) -> None:
            for one in (town, other):
                one.clock.advance(LEASE_MS + 1)
            assert (await other.core.refunder.run_once()).done == 1

        gate = ChannelGate(lambda _: ChannelTraits(calls_per_second=1), town.clock, taken_over)
        before = town.driver.asked(BANK)["refund"]
        # The gate's first turn, the question, is free; the second has to be waited for.
        assert (await town.core.a_refunder(gate).run_once())[:2] == (0, 0)
    assert town.driver.asked(BANK)["refund"] == before + 1
    assert await owed.states() == [(1, RefundState.REFUNDED)]
    assert owed.kept_minor() == 0


async def test_refund_whose_turn_to_send_comes_late_is_sent_under_a_lease_that_begins_then(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)

    async def long_wait(_: int) -> None:
        town.clock.advance(10 * LEASE_MS)

    gate = ChannelGate(lambda _: ChannelTraits(calls_per_second=1), town.clock, long_wait)
    assert (await town.core.a_refunder(gate).run_once()).done == 1
    assert list(owed.at_bank().values()) == ["REFUNDED"]


async def test_refunder_asks_nothing_with_a_lease_that_ended_while_it_waited_for_its_turn(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)

    async def long_wait(_: int) -> None:
        town.clock.advance(LEASE_MS)

    gate = ChannelGate(lambda _: ChannelTraits(calls_per_second=1), town.clock, long_wait)
    async with gate.call("simbank", "bank_b"):
        before = asked(town)
    await town.core.a_refunder(gate).run_once()
    assert asked(town) == before
    assert await owed.states() == [(1, RefundState.PENDING)]
    await town.core.a_refunder(draw=secrets.randbelow).run_once()
    assert list(owed.at_bank().values()) == ["REFUNDED"]
