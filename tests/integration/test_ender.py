"""The ender over real banks: an older page is closed once a younger one took its place, unless it is wanted again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from paycore.channels.protocol import ChannelTraits
from paycore.domain.verdicts import AttemptState, NotifyOutcome, PaymentState
from paycore.jobs.gate import ChannelGate
from paycore.jobs.runner import Pass
from paycore.jobs.task_job import FIRST_REST_MS
from paycore.usecases.pay import NextAction
from paycore.usecases.pay_command import PayCommand
from tests.support.bank import Street, Town, a_town
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, change, check_money_rules
from tests.support.repair import Repair, Watched, left

END = ("END", 1)
FIVE_MINUTES_MS = 300_000
LEASE_MS = 5_000


@pytest.fixture
def repair(town: Town) -> Repair:
    return Repair(town.core)


async def superseded(town: Town, **faults: Any) -> tuple[PayCommand, int]:
    """A payment with a page at bank A and a younger one at bank B; faults are planted at bank A afterwards."""
    command = town.order()
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.plant(command, **faults)
    return command, payment_id


async def attempt_state(town: Town, payment_id: int, attempt: int = 1) -> AttemptState:
    return AttemptState((await town.file(payment_id)).record.attempts[attempt].state)


async def test_older_attempt_is_closed_at_its_bank_and_the_younger_one_stays_open(town: Town, repair: Repair) -> None:
    _, payment_id = await superseded(town)
    assert ("END", 2) not in repair.tasks(payment_id)
    assert await repair.run("ender") == [Pass(done=1)]
    assert await attempt_state(town, payment_id) == AttemptState.CLOSED
    assert town.books(payment_id)["state"] == "CLOSED"
    assert town.books(payment_id, 2, "bank_b")["state"] == "NOT_PAID"
    assert END not in repair.tasks(payment_id)


async def test_older_attempt_is_not_closed_before_the_age_that_its_channel_asks_for(
    street: Street, db_url: str
) -> None:
    async with a_town(db_url, street, traits=ChannelTraits(min_close_age_ms=FIVE_MINUTES_MS)) as town:
        repair = Repair(town.core)
        _, payment_id = await superseded(town)
        recorded_at_ms = (await town.file(payment_id)).record.attempts[1].recorded_at_ms
        assert repair.tasks(payment_id)[END].next_at_ms == recorded_at_ms + FIVE_MINUTES_MS
        town.clock.advance(FIVE_MINUTES_MS - 5_000)
        assert await repair.run("ender") == [Pass()]
        assert town.books(payment_id)["state"] == "NOT_PAID"
        town.clock.advance(5_000)
        assert await repair.run("ender") == [Pass(done=1)]
        assert town.books(payment_id)["state"] == "CLOSED"


async def test_older_attempt_that_was_paid_is_kept(town: Town, repair: Repair) -> None:
    _, payment_id = await superseded(town, notify_never=True)
    town.user_pays(payment_id)
    assert await repair.run("ender") == [Pass(done=1)]
    record = (await town.file(payment_id)).record
    assert record.outcome is not None
    assert (record.state, record.outcome.attempt) == (PaymentState.PAID, 1)


async def test_older_attempt_that_was_paid_after_the_younger_one_goes_back(town: Town, repair: Repair) -> None:
    _, payment_id = await superseded(town, notify_never=True)
    town.user_pays(payment_id, 2, "bank_b")
    await town.hand_on(payment_id, 2)
    town.user_pays(payment_id)
    await repair.run("ender")
    (excess,) = (await town.file(payment_id)).record.excess
    assert (excess.attempt, excess.reason) == (1, NotifyOutcome.DUPLICATE)
    await town.refund()
    assert town.kept_minor(payment_id, (1, "bank_a"), (2, "bank_b")) == AMOUNT_MINOR
    check_money_rules(town.core.snapshot())


async def test_attempt_that_pay_took_up_again_is_left_alone(town: Town, repair: Repair) -> None:
    command, payment_id = await superseded(town)
    watched = Watched(town, payment_id)
    again = await town.core.pay(command)
    assert (again.attempt.attempt, again.next_action) == (1, NextAction.REDIRECT)
    assert await repair.run("ender") == [Pass(done=1)]
    assert watched.queries == 0
    assert END not in repair.tasks(payment_id)
    assert town.books(payment_id)["state"] == "NOT_PAID"


async def test_attempt_that_was_taken_up_and_given_up_again_is_ended(town: Town, repair: Repair) -> None:
    command, payment_id = await superseded(town)
    await town.core.pay(command)
    await repair.run("ender")
    await town.core.pay(command._replace(account="bank_c"))
    assert END in repair.tasks(payment_id)
    await repair.run("ender")
    assert await attempt_state(town, payment_id) == AttemptState.CLOSED
    assert await attempt_state(town, payment_id, 2) == AttemptState.CLOSED


async def test_pay_that_meets_the_ender_waits_and_hands_out_no_page_that_is_being_closed(
    street: Street, db_url: str
) -> None:
    """The bank holds its answer to the close back while the user comes back to the older page."""
    async with a_town(db_url, street, timeout_ms=15_000) as town:
        repair = Repair(town.core)
        command, payment_id = await superseded(town, answer_delay_ms={"close": {"value": 700, "times": 1}})
        ending = asyncio.create_task(repair.ender.run_once())
        async with asyncio.timeout(10):
            while left(town, payment_id, "answer_delay_ms.close"):
                await asyncio.sleep(0.005)
        again = await town.core.pay(command)
        assert (await ending).done == 1
        assert await attempt_state(town, payment_id) == AttemptState.CLOSED
        assert (again.attempt.attempt, again.next_action) == (3, NextAction.REDIRECT)
        assert town.books(payment_id, 3)["state"] == "NOT_PAID"


@pytest.mark.parametrize(
    "fault",
    [{"error_500": {"query": True}}, {"error_500": {"close": True}}, {"refuse": {"close": True}}],
    ids=["query_error", "close_error", "close_in_progress"],
)
async def test_ender_without_a_final_word_gives_the_page_back_and_comes_again(
    town: Town, repair: Repair, fault: dict[str, Any]
) -> None:
    command, payment_id = await superseded(town, **fault)
    assert await repair.run("ender") == [Pass(put_off=1)]
    row = (await town.file(payment_id)).record.attempts[1]
    assert (row.state, row.lease_until_ms, row.lease_token) == (AttemptState.OPEN, 0, "")
    assert repair.tasks(payment_id)[END].next_at_ms <= town.clock.now_ms() + FIRST_REST_MS
    # The user may go on there meanwhile.
    assert (await town.core.pay(command)).attempt.attempt == 1


async def test_ender_gives_up_at_the_expiry_of_the_attempt(town: Town, repair: Repair) -> None:
    _, payment_id = await superseded(town, error_500={"query": True})
    await repair.run("ender")
    town.clock.advance(VALIDITY_MS + 1)
    assert await repair.run("ender") == [Pass(done=1)]
    assert END not in repair.tasks(payment_id)


@pytest.mark.parametrize("turn", ["to_ask", "to_close"])
async def test_page_that_pay_handed_out_while_the_ender_waited_for_its_turn_stays_open(town: Town, turn: str) -> None:
    """Its lease, if it had one by then, has ended meanwhile."""
    command, payment_id = await superseded(town)
    handed_out = []

    async def wait(_: int) -> None:
        town.clock.advance(LEASE_MS + 1)
        handed_out.append(await town.core.pay(command))

    # The gate's first turn is free.
    gate = ChannelGate(lambda _: ChannelTraits(calls_per_second=1), town.clock, wait)
    repair = Repair(town.core, lease_ms=LEASE_MS, gate=gate)
    if turn == "to_ask":
        async with gate.call("simbank", "bank_a"):
            pass
    watched = Watched(town, payment_id)
    assert await repair.run("ender") == [Pass(put_off=1)]
    assert [(one.attempt.attempt, one.next_action) for one in handed_out] == [(1, NextAction.REDIRECT)]
    assert watched.queries == (0 if turn == "to_ask" else 1)
    assert town.books(payment_id)["state"] == "NOT_PAID"
    row = (await town.file(payment_id)).record.attempts[1]
    assert (row.state, row.lease_token) == (AttemptState.OPEN, "")


async def test_attempt_whose_turn_to_be_closed_comes_after_its_lease_is_closed_under_another(town: Town) -> None:
    _, payment_id = await superseded(town)

    async def long_wait(_: int) -> None:
        town.clock.advance(LEASE_MS + 1)

    gate = ChannelGate(lambda _: ChannelTraits(calls_per_second=1), town.clock, long_wait)
    assert await Repair(town.core, lease_ms=LEASE_MS, gate=gate).run("ender") == [Pass(done=1)]
    assert town.books(payment_id)["state"] == "CLOSED"


async def test_attempt_that_a_clock_an_hour_ahead_leased_is_ended_and_handed_out_at_once(
    town: Town, repair: Repair
) -> None:
    command, payment_id = await superseded(town)
    until_ms = town.clock.now_ms() + 3_600_000
    change(town.core.url, text(f"UPDATE channel_order SET lease_until_ms = {until_ms}, lease_token = 'dead'"))
    # Nobody waits for the dead: the younger page is handed out, the older one is ended.
    younger = await town.core.pay(command._replace(account="bank_b"))
    assert (younger.attempt.attempt, younger.next_action) == (2, NextAction.REDIRECT)
    assert await repair.run("ender") == [Pass(done=1)]
    assert town.books(payment_id)["state"] == "CLOSED"


async def test_ender_that_died_leaves_a_lease_that_ends(town: Town) -> None:
    """Killed between taking the lease and the bank's answer: Pay waits for the lease's end, and no longer."""
    repair = Repair(town.core, lease_ms=2_000)
    command, payment_id = await superseded(town, hang_before_doing={"query": {"value": True, "times": 1}})
    ending = asyncio.create_task(repair.ender.run_once())
    async with asyncio.timeout(10):
        while left(town, payment_id, "hang_before_doing.query"):
            await asyncio.sleep(0.005)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    waited = await town.core.pay(command, within_ms=400)
    assert (waited.attempt.attempt, waited.next_action) == (1, NextAction.WAIT)
    town.clock.advance(2_000)
    assert (await town.core.pay(command)).next_action == NextAction.REDIRECT
