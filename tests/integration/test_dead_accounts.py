"""Accounts that nobody can ask about: a dead contract keeps no other waiting, and nothing is given up unasked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from paycore.channels.protocol import QueryState
from paycore.domain.verdicts import CloseReason
from paycore.jobs.gate import AT_ONCE, LONGEST_REST_MS, SILENT_AFTER, ChannelGate
from paycore.jobs.runner import Pass
from paycore.jobs.task_job import BATCH, OTHERS_MS
from paycore.jobs.task_job import LONGEST_REST_MS as LONGEST_TASK_REST_MS
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from tests.support.bank import Street, Town, a_town
from tests.support.clock import ManualClock
from tests.support.core import CHANNEL, VALIDITY_MS, Core, check_money_rules, pay_command
from tests.support.repair import UNREACHABLE_MS, Repair
from tests.support.scripted import ScriptedChannel

DEAD, ALIVE = "bank_a", "bank_b"
FIRST_SLICE_ONLY = 16
"""Milliseconds after which the next payment lies in the same share again."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def channel() -> ScriptedChannel:
    return ScriptedChannel()


@pytest.fixture
def core(db_url: str, clock: ManualClock, channel: ScriptedChannel) -> Iterator[Core]:
    with Core(db_url, clock=clock, channels={CHANNEL: channel}, retry_ms=5_000) as core:
        yield core


async def owe(core: Core, clock: ManualClock, account: str, count: int) -> None:
    """Let an account owe so many refunds, all of one share."""
    keeps = ALIVE if account == DEAD else DEAD
    for _ in range(count):
        payment_id = await core.make_payment(keeps, account)
        words = [core.word(payment_id, 1, account=keeps), core.word(payment_id, 2, account=account)]
        await core.notify_many(*words)
        clock.advance(FIRST_SLICE_ONLY)


def refunded(core: Core) -> int:
    return len(core.snapshot()["refund_result"])


async def test_refunds_of_a_dead_account_keep_no_other_of_its_channel_waiting(
    core: Core, clock: ManualClock, channel: ScriptedChannel
) -> None:
    await owe(core, clock, DEAD, 150)
    await owe(core, clock, ALIVE, 10)
    channel.dead = {DEAD}
    refunder = core.a_refunder()
    await refunder.run_once()
    assert refunded(core) == 10
    assert channel.asked_of[DEAD] <= SILENT_AFTER + AT_ONCE
    # The same while it is found out whether the dead one is back, however long that takes.
    await owe(core, clock, ALIVE, 10)
    clock.advance(LONGEST_REST_MS)
    before, asked, found_out = channel.asked_of[DEAD], asyncio.Event(), asyncio.Event()

    async def hang_once(_: str) -> None:
        # Only the call that goes ahead about the dead account; those about the other one are answered at once.
        if channel.asked_of[DEAD] > before and not asked.is_set():
            asked.set()
            await found_out.wait()

    channel.meanwhile = hang_once
    running = asyncio.create_task(refunder.run_once())
    async with asyncio.timeout(20):
        await asked.wait()
        while refunded(core) < 20:
            await asyncio.sleep(0.01)
    assert channel.asked_of[DEAD] == before + 1
    channel.dead = set()
    found_out.set()
    more = (await running).more
    while more:
        more = (await refunder.run_once()).more
    clock.advance(3_600_000)
    await refunder.run_once()
    assert refunded(core) == 170
    check_money_rules(core.snapshot())


async def opened(core: Core, clock: ManualClock, account: str, count: int) -> list[int]:
    """So many payments with a page at an account, all of one share."""
    payment_ids = []
    for number in range(count):
        paid = await core.pay(pay_command(f"{account}-{number}", account))
        payment_ids.append(paid.payment.payment_id)
        clock.advance(FIRST_SLICE_ONLY)
    return payment_ids


@pytest.mark.parametrize("job", ["closer", "recoverer"])
async def test_tasks_of_a_dead_account_keep_no_other_of_its_channel_waiting(
    core: Core, clock: ManualClock, channel: ScriptedChannel, job: str
) -> None:
    repair = Repair(core)
    await opened(core, clock, DEAD, BATCH + 10)
    await opened(core, clock, ALIVE, 5)
    channel.dead = {DEAD}
    clock.advance(VALIDITY_MS + NOT_EXIST_MARGIN_MS + 1)
    assert await repair.run(job) == [Pass(done=5, put_off=BATCH + 10)]
    assert channel.asked_of[DEAD] <= SILENT_AFTER + AT_ONCE


GIVEN_UP = {"closer": "paycore_closed_unreachable_total", "recoverer": "paycore_attempts_given_up_total"}


@pytest.mark.parametrize("job", GIVEN_UP)
async def test_nothing_is_given_up_past_the_limit_that_the_channel_was_not_asked_about(
    core: Core, clock: ManualClock, channel: ScriptedChannel, job: str
) -> None:
    """No job ran for eight days, and when they run again the channel happens to be down."""
    repair, count = Repair(core), 60
    payment_ids = await opened(core, clock, DEAD, count)
    clock.advance(UNREACHABLE_MS + 86_400_000)
    channel.dead, channel.queried = {DEAD}, channel.queried._replace(state=QueryState.CLOSED)
    await repair.run(job)
    labels = {"channel": CHANNEL} if job == "recoverer" else {}
    given_up = core.count(GIVEN_UP[job], **labels)
    assert SILENT_AFTER <= given_up == channel.asked["query"] <= SILENT_AFTER + AT_ONCE
    # It answers again: the others get their word.
    channel.dead = set()
    for _ in range(3):
        clock.advance(LONGEST_TASK_REST_MS)
        await repair.run(job)
    assert core.count(GIVEN_UP[job], **labels) == given_up
    assert channel.asked["query"] == count
    kind = repair.jobs[job].kind.name  # type: ignore[attr-defined]  # each of these works off one kind
    assert not [key for payment_id in payment_ids for key in repair.tasks(payment_id) if key[0] == kind]


@pytest.mark.parametrize("job", ["closer", "recoverer", "ender"])
async def test_task_about_an_account_that_is_not_configured_here_is_left_as_it_is_to_who_has_it(
    street: Street, town: Town, job: str
) -> None:
    async with a_town(town.core.url, street, accounts=(DEAD,)) as other:
        command = town.order(ALIVE)
        payment_id = (await town.core.pay(command)).payment.payment_id
        await town.core.pay(command._replace(account=DEAD))
        jobs, others = Repair(town.core), Repair(other.core)
        after_ms = 0 if job == "ender" else UNREACHABLE_MS + VALIDITY_MS + NOT_EXIST_MARGIN_MS + 1
        for one in (town, other):
            one.clock.advance(after_ms)
        kind = jobs.jobs[job].kind.name  # type: ignore[attr-defined]  # each of these works off one kind
        tasks = {key: row for key, row in jobs.tasks(payment_id).items() if key[0] == kind}
        with other.core.watch() as written:
            (result,) = await others.run(job)
        assert result[:2] == ((1, 0) if job == "recoverer" else (0, 0))
        assert not written.rows("payment_outcome")
        left = {key: row for key, row in tasks.items() if key != ("QUERY", 2)}
        assert left.items() <= jobs.tasks(payment_id).items()
        assert other.core.count("paycore_attempts_given_up_total", channel=CHANNEL) == 0
        await jobs.run(job)
        assert not [key for key in jobs.tasks(payment_id) if key[0] == kind]
        assert town.books(payment_id, 1, ALIVE)["state"] == "CLOSED"


async def test_tasks_about_an_account_that_nobody_has_wait_in_sight_and_keep_no_other_waiting(
    core: Core, db_url: str, clock: ManualClock, channel: ScriptedChannel
) -> None:
    payment_ids = await opened(core, clock, DEAD, BATCH + 10)
    await opened(core, clock, ALIVE, 3)
    clock.advance(UNREACHABLE_MS + VALIDITY_MS)
    with Core(db_url, clock=clock, channels={CHANNEL: channel}, accounts=(ALIVE,)) as other:
        repair = Repair(other)
        (result,) = await repair.run("closer")
        assert (result.done, result.put_off, result.more) == (3, 0, False)
        assert result.lag_ms >= UNREACHABLE_MS
        # Passed over without a look for a while, and without a write for ever.
        for _ in range(3):
            clock.advance(OTHERS_MS)
            with other.watch() as written:
                assert (await repair.run("closer"))[0][:2] == (0, 0)
            assert written.names() <= {"lease"}
    reasons = [row.close_reason for row in core.snapshot()["payment_outcome"] if row.payment_id in payment_ids]
    assert CloseReason.UNREACHABLE not in reasons
    assert reasons == []
    # Once it is configured they are settled.
    assert await Repair(core).run("closer") == [Pass(done=BATCH + 10)]


async def test_refund_of_an_account_that_is_not_configured_here_is_not_touched(
    core: Core, db_url: str, clock: ManualClock, channel: ScriptedChannel
) -> None:
    await owe(core, clock, DEAD, 70)
    await owe(core, clock, ALIVE, 5)
    with Core(db_url, clock=clock, channels={CHANNEL: channel}, accounts=(ALIVE,)) as other:
        before = {row.next_at_ms for row in core.snapshot()["refund_try"]}
        result = await other.a_refunder(ChannelGate(other.registry.traits, clock)).run_once()
        assert (result.done, result.put_off, result.more) == (5, 0, False)
        assert result.lag_ms > 0
        assert {row.next_at_ms for row in core.snapshot()["refund_try"] if row.asks == 0} <= before
    assert (await core.a_refunder().run_once()).done == 70
