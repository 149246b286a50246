"""Clocks that jump while a pass is under way: each piece of work is looked at once, and comes back when it is due."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from paycore.channels.protocol import QueryState, RefundAnswer
from paycore.jobs.refunder import IN_FLIGHT
from paycore.jobs.task_job import BATCH, LONGEST_REST_MS
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from tests.support.clock import ManualClock
from tests.support.core import CHANNEL, VALIDITY_MS, Core, check_money_rules, pay_command
from tests.support.repair import Repair
from tests.support.scripted import ScriptedChannel, jump_once

HOUR_MS = 3_600_000
MANY = 12
PATIENCE_SECONDS = 20
"""A pass that is not over by then goes round in circles."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def channel() -> ScriptedChannel:
    return ScriptedChannel(queried=QueryState.IN_PROGRESS, refunded=RefundAnswer.ACCEPTED)


@pytest.fixture
def core(db_url: str, clock: ManualClock, channel: ScriptedChannel) -> Iterator[Core]:
    with Core(db_url, clock=clock, channels={CHANNEL: channel}, retry_ms=5_000) as core:
        yield core


async def opened(core: Core, clock: ManualClock, count: int = MANY) -> list[int]:
    """So many payments whose page at bank A a page at bank B took the place of; they lie in every share."""
    payment_ids = []
    for number in range(count):
        for bank in ("bank_a", "bank_b"):
            paid = await core.pay(pay_command(f"jump-{number}", bank))
        payment_ids.append(paid.payment.payment_id)
        clock.advance(1)
    return payment_ids


DUE_MS = {"closer": VALIDITY_MS + 1, "recoverer": VALIDITY_MS + NOT_EXIST_MARGIN_MS + 2, "ender": 0}
ATTEMPTS = {"closer": 2, "recoverer": 2, "ender": 1}


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS])
@pytest.mark.parametrize("job", DUE_MS)
async def test_task_is_looked_at_once_in_a_pass_in_which_the_clock_jumps(
    core: Core, clock: ManualClock, channel: ScriptedChannel, job: str, jump_ms: int
) -> None:
    repair = Repair(core)
    payment_ids = await opened(core, clock)
    clock.advance(DUE_MS[job])
    channel.meanwhile = jump_once(clock, jump_ms)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await repair.run(job)
    assert 1 <= channel.asked["query"] <= ATTEMPTS[job] * MANY
    # By the time that the clock said, all that was left or put off is due again.
    clock.advance(max(0, -jump_ms))
    channel.queried = channel.queried._replace(state=QueryState.NOT_PAID)
    clock.advance(LONGEST_REST_MS if job != "ender" else 6_000)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await repair.run(job))[0].more:
            pass
    kind = repair.jobs[job].kind.name  # type: ignore[attr-defined]  # each of these works off one kind
    assert not [key for payment_id in payment_ids for key in repair.tasks(payment_id) if key[0] == kind]


@pytest.fixture
async def owing(core: Core) -> int:
    """More refunds of one share than a pass claims at once; how many."""
    count = IN_FLIGHT + BATCH
    for number in range(count):
        payment_id = await core.make_payment("bank_a", "bank_b")
        await core.notify_many(core.word(payment_id, 1, f"A{number}"), core.word(payment_id, 2, f"B{number}"))
    assert len({row.slice for row in core.snapshot()["refund_try"]}) == 1
    return count


@pytest.mark.parametrize("jump_ms", [HOUR_MS, -HOUR_MS])
async def test_refund_is_asked_about_once_in_a_pass_in_which_the_clock_jumps(
    core: Core, clock: ManualClock, channel: ScriptedChannel, owing: int, jump_ms: int
) -> None:
    channel.meanwhile = jump_once(clock, jump_ms)
    refunder = core.a_refunder()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await refunder.run_once()
    assert 1 <= channel.asked["query_refund"] <= owing
    clock.advance(max(0, -jump_ms) + 5_000)
    channel.refunded = channel.refunded._replace(answer=RefundAnswer.REFUNDED)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (await refunder.run_once()).more:
            pass
    assert len(core.snapshot()["refund_result"]) == owing
    assert channel.asked["refund"] == 0
    check_money_rules(core.snapshot())
