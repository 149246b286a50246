"""The recoverer over real banks: money whose notification was lost is found, and is judged like any other."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from paycore.channels.protocol import ChannelTraits
from paycore.domain.errors import ChannelUnavailableError
from paycore.domain.verdicts import AttemptState, CaptureSource, CloseReason, NotifyOutcome, PaymentState, PayMethod
from paycore.jobs.runner import Pass
from paycore.jobs.task_job import FIRST_REST_MS, LONGEST_REST_MS
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from tests.support.bank import Street, Town, a_town
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, check_money_rules
from tests.support.repair import UNREACHABLE_MS, Repair, Watched, pass_time

ONCE: dict[str, Any] = {"value": True, "times": 1}
LADDER_MS = (5_000, 30_000, 60_000, 180_000, 300_000, 600_000, 1_800_000)
QUERY = ("QUERY", 1)
AFTER_LAST_LOOK_MS = VALIDITY_MS + NOT_EXIST_MARGIN_MS + 1


@pytest.fixture
def repair(town: Town) -> Repair:
    return Repair(town.core)


async def opened(town: Town, **faults: Any) -> int:
    """A payment with an open page at bank A, where faults are planted afterwards."""
    command = town.order()
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    town.plant(command, **faults)
    return payment_id


async def state_of(town: Town, payment_id: int) -> PaymentState:
    return (await town.file(payment_id)).record.state


async def wait_until_due(town: Town, repair: Repair, payment_id: int, task: tuple[str, int] = QUERY) -> int:
    """Let time pass until a task is due; return how long that is."""
    wait_ms = repair.tasks(payment_id)[task].next_at_ms - town.clock.now_ms()
    town.clock.advance(max(0, wait_ms))
    return wait_ms


async def test_lost_notification_is_found_on_the_first_rung(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, notify_never=True)
    (trade_no,) = town.user_pays(payment_id)
    assert await repair.run("recoverer") == [Pass()]
    town.clock.advance(LADDER_MS[0])
    assert await repair.run("recoverer") == [Pass(done=1)]
    outcome = (await town.file(payment_id)).record.outcome
    assert outcome is not None
    assert (outcome.state, outcome.channel_trade_no) == (PaymentState.PAID, trade_no)
    assert outcome.source == CaptureSource.QUERY
    assert [row.payment_id for row in town.core.snapshot()["queried_paid"]] == [payment_id]
    assert QUERY not in repair.tasks(payment_id)


@pytest.mark.parametrize("ladder_ms", [LADDER_MS, (1_000, 2_000)], ids=["usual", "short"])
async def test_live_attempt_is_asked_about_on_the_ladder_of_its_channel_and_once_after_its_expiry(
    street: Street, db_url: str, ladder_ms: tuple[int, ...]
) -> None:
    async with a_town(db_url, street, traits=ChannelTraits(query_ladder_ms=ladder_ms)) as town:
        repair = Repair(town.core)
        payment_id = await opened(town)
        watched = Watched(town, payment_id)
        at_ms = (await town.file(payment_id)).record.attempts[1].recorded_at_ms
        last_at_ms = at_ms + AFTER_LAST_LOOK_MS
        waits_s = []
        while QUERY in repair.tasks(payment_id):
            due_ms = repair.tasks(payment_id)[QUERY].next_at_ms
            waits_s.append((due_ms - at_ms) // 1_000)
            at_ms = due_ms
            await wait_until_due(town, repair, payment_id)
            await repair.run("recoverer")
        of_age_ms = itertools.accumulate(ladder_ms)
        rungs = [wait_ms for wait_ms, age_ms in zip(ladder_ms, of_age_ms, strict=True) if age_ms < AFTER_LAST_LOOK_MS]
        assert waits_s[:-1] == [wait_ms // 1_000 for wait_ms in rungs]
        assert at_ms == last_at_ms
        assert watched.queries == len(waits_s)
        assert town.books(payment_id)["state"] == "CLOSED"


@pytest.mark.parametrize("done", [True, False], ids=["opened_at_the_bank", "never_arrived"])
async def test_unknown_attempt_is_asked_about_too(town: Town, repair: Repair, done: bool) -> None:
    command = town.order()
    fault: dict[str, Any] = {"hang_after_doing" if done else "hang_before_doing": {"create": ONCE}}
    town.plant(command, **fault)
    with pytest.raises(ChannelUnavailableError):
        await town.core.pay(command)
    (payment,) = town.core.snapshot()["payment"]
    if done:
        town.user_pays(payment.payment_id, notify_never=True)
    town.clock.advance(LADDER_MS[0])
    await repair.run("recoverer")
    assert await state_of(town, payment.payment_id) == (PaymentState.PAID if done else PaymentState.OPEN)


async def test_attempt_whose_opening_was_cut_off_is_asked_about_too(town: Town, repair: Repair) -> None:
    """The process died between the order's arrival at the bank and the note of it."""
    payment_id = await opened(town, notify_never=True)
    row = (await town.file(payment_id)).record.attempts[1]
    cut_off = row._replace(state=AttemptState.CREATING, credential="", lease_until_ms=0, lease_token="gone")
    await town.core.writer.run(_Rewrite(cut_off))
    town.user_pays(payment_id)
    town.clock.advance(LADDER_MS[0])
    await repair.run("recoverer")
    assert await state_of(town, payment_id) == PaymentState.PAID


class _Rewrite:
    """A write unit: an attempt's conversation as it was left."""

    def __init__(self, row: Any) -> None:
        self._row = row

    def apply(self, transaction: Any) -> None:
        assert transaction.update_channel_order(self._row, expected=tuple(AttemptState))

    def committed(self, index: Any) -> None:
        """Nothing of it is cached."""


async def test_charge_without_a_word_is_found_in_whatever_it_came_to(town: Town, repair: Repair) -> None:
    command = town.order(method=PayMethod.CHARGE)
    town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 800}, notify_never=True)
    payment_id = (await town.core.pay(command, within_ms=300)).payment.payment_id
    async with asyncio.timeout(10):
        while town.books(payment_id)["state"] != "PAID":
            await asyncio.sleep(0.02)
    town.clock.advance(LADDER_MS[0])
    await repair.run("recoverer")
    assert await state_of(town, payment_id) == PaymentState.PAID


@pytest.mark.parametrize(
    "fault",
    [
        {"error_500": {"query": ONCE}},
        {"hang_after_doing": {"query": ONCE}},
        {"answer_delay_ms": {"query": {"value": 2_000, "times": 1}}},
        {"nonsense": {"query": {"value": "wrong_number", "times": 1}}},
    ],
    ids=["error", "hangs", "slow", "nonsense"],
)
async def test_look_without_an_answer_says_nothing_and_is_made_again(
    town: Town, repair: Repair, fault: dict[str, Any]
) -> None:
    payment_id = await opened(town, notify_never=True, **fault)
    town.user_pays(payment_id)
    town.clock.advance(LADDER_MS[0])
    assert await repair.run("recoverer") == [Pass(put_off=1)]
    assert await state_of(town, payment_id) == PaymentState.OPEN
    assert repair.tasks(payment_id)[QUERY].last_error
    town.clock.advance(FIRST_REST_MS)
    assert await repair.run("recoverer") == [Pass(done=1)]
    assert await state_of(town, payment_id) == PaymentState.PAID


async def test_silent_channel_uses_up_no_rung_that_is_still_to_come(town: Town, repair: Repair) -> None:
    """Asked in vain for minutes, the attempt is asked about on every later rung of its ladder all the same."""
    payment_id = await opened(town, error_500={"query": {"value": True, "times": 6}})
    opened_at_ms = (await town.file(payment_id)).record.attempts[1].recorded_at_ms
    while (await repair.run("recoverer"))[0] != Pass(done=1):
        await wait_until_due(town, repair, payment_id)
    age_ms = town.clock.now_ms() - opened_at_ms
    of_age_ms = list(itertools.accumulate(LADDER_MS))
    assert 100_000 < age_ms < of_age_ms[4]
    next_rung_ms = next(rung_ms for rung_ms in of_age_ms if rung_ms > age_ms)
    assert repair.tasks(payment_id)[QUERY].next_at_ms == opened_at_ms + next_rung_ms


async def test_money_on_an_attempt_that_was_closed_is_found_by_the_last_look_and_goes_back(
    town: Town, repair: Repair
) -> None:
    """R8: the channel took money after it had said that the order is closed, and told nobody."""
    payment_id = await opened(town, notify_never=True, take_after_close=True)
    town.clock.advance(VALIDITY_MS + 1)
    await repair.run("closer")
    assert await state_of(town, payment_id) == PaymentState.CLOSED
    town.user_pays(payment_id)
    await repair.run("recoverer")
    assert (await town.file(payment_id)).record.excess == []
    town.clock.advance(NOT_EXIST_MARGIN_MS)
    await repair.run("recoverer")
    (excess,) = (await town.file(payment_id)).record.excess
    assert excess.reason == NotifyOutcome.LATE
    await town.refund()
    assert town.books(payment_id)["kept_minor"] == 0
    assert repair.tasks(payment_id) == {}
    check_money_rules(town.core.snapshot())


async def test_money_on_an_attempt_that_failed_is_found_by_the_last_look(town: Town, repair: Repair) -> None:
    """R8: a success for an attempt that we called FAILED is still a success; the payment was closed meanwhile."""
    payment_id = await opened(town, notify_never=True)
    await town.core.notify(town.core.failure(payment_id))
    assert (await town.file(payment_id)).record.attempts[1].state == AttemptState.FAILED
    town.clock.advance(LADDER_MS[0])
    watched = Watched(town, payment_id)
    await repair.run("recoverer")
    assert watched.queries == 0
    town.user_pays(payment_id)
    town.clock.advance(VALIDITY_MS)
    await repair.run("closer")
    await pass_time(town, repair, NOT_EXIST_MARGIN_MS, "recoverer")
    file = await town.file(payment_id)
    assert [row.reason for row in file.record.excess] == [NotifyOutcome.LATE]
    assert len(file.refunds) == 1


async def test_second_payment_on_another_page_is_found_and_goes_back(town: Town, repair: Repair) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.plant(command, bank="bank_b", notify_never=True)
    town.user_pays(payment_id)
    await town.hand_on(payment_id)
    town.user_pays(payment_id, 2, "bank_b")
    town.clock.advance(LADDER_MS[0])
    await repair.run("recoverer")
    (excess,) = (await town.file(payment_id)).record.excess
    assert excess.reason == NotifyOutcome.DUPLICATE
    await town.refund()
    assert town.kept_minor(payment_id, (1, "bank_a"), (2, "bank_b")) == AMOUNT_MINOR
    check_money_rules(town.core.snapshot())


async def test_page_that_a_paid_payment_left_open_is_closed_after_its_expiry(town: Town, repair: Repair) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.user_pays(payment_id)
    await town.hand_on(payment_id)
    await pass_time(town, repair, AFTER_LAST_LOOK_MS, "recoverer")
    assert town.books(payment_id, 2, "bank_b")["state"] == "CLOSED"
    assert ("QUERY", 2) not in repair.tasks(payment_id)


async def test_last_look_without_an_answer_is_made_again_until_the_limit(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, error_500={"query": True})
    await pass_time(town, repair, AFTER_LAST_LOOK_MS + LONGEST_REST_MS, "recoverer")
    assert QUERY in repair.tasks(payment_id)
    assert town.core.count("paycore_attempts_given_up_total", channel="simbank") == 0
    await pass_time(town, repair, UNREACHABLE_MS, "recoverer", most_ms=UNREACHABLE_MS)
    assert QUERY not in repair.tasks(payment_id)
    assert town.core.count("paycore_attempts_given_up_total", channel="simbank") == 1
    # Nothing was decided by silence.
    assert (await town.file(payment_id)).record.attempts[1].state == AttemptState.OPEN


async def test_wrong_amount_found_by_asking_lies_in_quarantine_and_decides_nothing(town: Town, repair: Repair) -> None:
    payment_id = await opened(town)
    await town.core.notify(town.core.word(payment_id, 1, "WRONG", amount_minor=1))
    town.clock.advance(LADDER_MS[0])
    assert await repair.run("recoverer") == [Pass(done=1)]
    assert await state_of(town, payment_id) == PaymentState.OPEN
    assert QUERY in repair.tasks(payment_id)


async def test_clock_an_hour_ahead_or_back_loses_no_look(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, notify_never=True)
    town.clock.advance(-3_600_000)
    assert await repair.run("recoverer") == [Pass()]
    town.clock.advance(2 * 3_600_000)
    town.user_pays(payment_id)
    await repair.run()
    file = await town.file(payment_id)
    assert file.record.state == PaymentState.PAID
    assert file.record.outcome is not None
    assert file.record.outcome.close_reason != CloseReason.EXPIRED
    town.clock.advance(-3_600_000)
    await repair.run()
    check_money_rules(town.core.snapshot())


async def test_two_recoverers_at_once_find_each_payment_once(town: Town) -> None:
    payment_ids = [await opened(town, notify_never=True) for _ in range(6)]
    for payment_id in payment_ids:
        town.user_pays(payment_id)
    town.clock.advance(LADDER_MS[0])
    first, second = Repair(town.core), Repair(town.core)
    await asyncio.gather(first.recoverer.run_once(), second.recoverer.run_once())
    rows = town.core.snapshot()
    assert {row.payment_id for row in rows["payment_outcome"]} == set(payment_ids)
    assert not rows["excess_payment"]
    assert not rows["quarantine"]
