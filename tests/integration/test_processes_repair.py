"""Closer, ender, Pay and notifications at the same instant in two processes over one database, beside real banks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from paycore.domain.verdicts import AttemptState, CloseReason, PaymentState, PayMethod
from paycore.jobs.task_job import FIRST_REST_MS
from tests.support.bank import Street, Town, a_town
from tests.support.books import check_books
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS
from tests.support.racers import Racer, payment_rows
from tests.support.repair import SLICE_LEASE_MS, Repair

ENDED, CREATING = "close.attempts_ended", "pay.before_create"
TO_LEASE, LEASED = "ender.before_lease", "ender.leased"
BEFORE_COMMIT = "store.before_commit"
HOUR_MS = 3_600_000
PATIENT_BANK_MS, PATIENT_LOCK_WAIT_MS = 15_000, 600
BOTH = ((1, "bank_a"), (2, "bank_b"))


class Race(NamedTuple):
    """Two processes, and this one beside them, over one database."""

    town: Town
    first: Racer
    second: Racer

    async def opened(self, **faults: Any) -> tuple[str, int]:
        """A payment with a page at bank A, where faults are planted."""
        command = self.town.order()
        payment_id: int = (await self.town.core.pay(command)).payment.payment_id
        self.town.plant(command, **faults)
        return command.merchant_order_no, payment_id

    def outcome(self, payment_id: int) -> Any:
        """The outcome's row, or None; there is never more than one."""
        found = payment_rows(self.town.core.url, payment_id).get("payment_outcome", [None])
        (row,) = found
        return row

    async def settle(self, payment_id: int) -> None:
        """Let everything that is owed go back, and hold the books."""
        await self.town.refund(passes=2)
        check_books(self.town.core.url)
        outcome = self.outcome(payment_id)
        kept = AMOUNT_MINOR if outcome is not None and outcome.state == PaymentState.PAID else 0
        attempts = [
            (number, bank) for number, bank in BOTH if self.town.driver.has_order(f"{payment_id}{number:02d}", bank)
        ]
        assert self.town.kept_minor(payment_id, *attempts) == kept


@pytest.fixture
async def race(street: Street, db_url: str, tmp_path: Path) -> AsyncIterator[Race]:
    # Nothing here waits in vain for a bank or a lock, however slow the machine is.
    async with a_town(db_url, street, timeout_ms=PATIENT_BANK_MS) as town:
        first, second = (
            Racer(db_url, tmp_path / name, bank_url=street.bank.url, gates=(ENDED, CREATING, TO_LEASE, LEASED))
            for name in ("first", "second")
        )
        first.lock_wait_ms = second.lock_wait_ms = PATIENT_LOCK_WAIT_MS
        await asyncio.gather(first.start(), second.start())
        try:
            yield Race(town, first, second)
        finally:
            await asyncio.gather(first.stop(), second.stop())


async def test_notification_that_overtakes_the_closer_is_kept(race: Race) -> None:
    """The closer has ended every attempt; the bank takes money all the same and tells another process first."""
    _, payment_id = await race.opened(take_after_close=True, notify_never=True)
    await race.first.ask("advance", by_ms=VALIDITY_MS + 1_000)
    race.first.shut(ENDED)
    closing = race.first.ask("run", job="closer")
    await race.first.reached(ENDED)
    (trade_no,) = race.town.user_pays(payment_id)
    assert await race.second.ask("notify", payment_id=payment_id, attempt=1, trade_no=trade_no) == ["ACCEPTED", False]
    race.first.open(ENDED)
    assert (await closing)[0] == 1
    assert race.outcome(payment_id).state == PaymentState.PAID
    await race.settle(payment_id)


@pytest.mark.parametrize("closer_first", [True, False], ids=["closer_commits_first", "notification_commits_first"])
async def test_closer_and_notification_that_are_written_at_the_same_instant_agree(
    race: Race, closer_first: bool
) -> None:
    """Each has decided and neither has committed: the outcome's key takes one of them."""
    _, payment_id = await race.opened(take_after_close=True, notify_never=True)
    await race.first.ask("advance", by_ms=VALIDITY_MS + 1_000)
    race.first.shut(ENDED)
    closing = race.first.ask("run", job="closer")
    await race.first.reached(ENDED)
    (trade_no,) = race.town.user_pays(payment_id)
    held = race.first if closer_first else race.second
    held.shut(BEFORE_COMMIT)
    if closer_first:
        race.first.open(ENDED)
    telling = (
        race.second.ask("notify", payment_id=payment_id, attempt=1, trade_no=trade_no) if not closer_first else None
    )
    await held.reached(BEFORE_COMMIT)
    if telling is None:
        telling = race.second.ask("notify", payment_id=payment_id, attempt=1, trade_no=trade_no)
    race.first.open(ENDED)
    # Long enough for the other one to come up against what is held, short enough for its patience.
    await asyncio.sleep(0.2)
    held.open(BEFORE_COMMIT)
    told, _ = await telling, await closing
    state = race.outcome(payment_id).state
    assert (told, state) in ((["LATE", False], PaymentState.CLOSED), (["ACCEPTED", False], PaymentState.PAID))
    assert state == (PaymentState.CLOSED if closer_first else PaymentState.PAID)
    await race.settle(payment_id)


async def test_closer_and_notification_let_go_together_settle_every_payment_once(race: Race) -> None:
    payment_ids = [(await race.opened(notify_never=True))[1] for _ in range(6)]
    trades = {payment_id: race.town.user_pays(payment_id)[0] for payment_id in payment_ids[::2]}
    await race.first.ask("advance", by_ms=VALIDITY_MS + 1_000)
    told = [race.second.ask("notify", payment_id=one, attempt=1, trade_no=trade) for one, trade in trades.items()]
    await asyncio.gather(race.first.ask("run", job="closer"), *told)
    for payment_id in payment_ids:
        state = PaymentState.PAID if payment_id in trades else PaymentState.CLOSED
        assert race.outcome(payment_id).state == state
        await race.settle(payment_id)


async def test_attempt_opened_while_the_closer_is_at_its_payment_is_ended_too(race: Race) -> None:
    """The closer's clock is an hour ahead, so it closes what Pay still opens another page for."""
    order_no, payment_id = await race.opened()
    await race.first.ask("advance", by_ms=VALIDITY_MS + 1_000)
    race.first.shut(ENDED)
    closing = race.first.ask("run", job="closer")
    await race.first.reached(ENDED)
    assert await race.second.ask("pay", order_no=order_no, account="bank_b") == ["REDIRECT", payment_id, 2]
    race.first.open(ENDED)
    assert (await closing)[0] == 1
    assert race.outcome(payment_id).close_reason == CloseReason.EXPIRED
    for number, bank in BOTH:
        assert race.town.books(payment_id, number, bank)["state"] == "CLOSED"
    await race.settle(payment_id)


async def test_page_whose_payment_is_closed_before_it_opens_is_handed_to_nobody(race: Race) -> None:
    """Pay is held before it calls the bank; to a clock an hour ahead its lease and the attempt's expiry are over."""
    order_no, payment_id = await race.opened()
    await race.first.ask("advance", by_ms=HOUR_MS)
    race.second.shut(CREATING)
    paying = race.second.ask("pay", order_no=order_no, account="bank_b")
    await race.second.reached(CREATING)
    assert (await race.first.ask("run", job="closer"))[0] == 1
    assert race.outcome(payment_id).state == PaymentState.CLOSED
    race.second.open(CREATING)
    assert await paying == "PAYMENT_CLOSED"
    # The bank has opened the order all the same; the last look closes it.
    assert race.town.books(payment_id, 2, "bank_b")["state"] == "NOT_PAID"
    await race.first.ask("run", job="recoverer")
    assert race.town.books(payment_id, 2, "bank_b")["state"] == "CLOSED"
    await race.settle(payment_id)


async def test_two_closers_on_one_payment_close_it_once(race: Race) -> None:
    """The first one is held until its lease on the share has ended, and comes back when all is done."""
    _, payment_id = await race.opened()
    await race.first.ask("advance", by_ms=VALIDITY_MS + 1_000)
    race.first.shut(ENDED)
    closing = race.first.ask("run", job="closer")
    await race.first.reached(ENDED)
    await race.second.ask("advance", by_ms=VALIDITY_MS + SLICE_LEASE_MS + 1_000)
    assert (await race.second.ask("run", job="closer"))[:2] == [1, 0]
    closed = race.outcome(payment_id)
    race.first.open(ENDED)
    await closing
    assert race.outcome(payment_id) == closed
    assert ("CLOSE", 0) not in Repair(race.town.core).tasks(payment_id)
    await race.settle(payment_id)


async def test_closers_in_two_processes_share_the_work_and_do_none_of_it_twice(race: Race) -> None:
    payment_ids = [(await race.opened())[1] for _ in range(12)]
    for racer in (race.first, race.second):
        await racer.ask("advance", by_ms=VALIDITY_MS + 1_000)
    passes = await asyncio.gather(*(racer.ask("run", job="closer") for racer in (race.first, race.second)))
    done = sum(one[0] for one in passes)
    # What one of them held when the other came by is done by it, at the latest with its next pass.
    done += (await race.first.ask("run", job="closer"))[0]
    assert done == len(payment_ids)
    for payment_id in payment_ids:
        assert race.outcome(payment_id).state == PaymentState.CLOSED


async def test_ender_that_holds_an_attempt_keeps_pay_from_handing_it_out(race: Race) -> None:
    order_no, payment_id = await race.opened()
    await race.second.ask("pay", order_no=order_no, account="bank_b")
    race.first.shut(LEASED)
    ending = race.first.ask("run", job="ender")
    await race.first.reached(LEASED)
    assert await race.second.ask("pay", order_no=order_no, account="bank_a", within_ms=500) == ["WAIT", payment_id, 1]
    paying = race.second.ask("pay", order_no=order_no, account="bank_a")
    race.first.open(LEASED)
    assert (await ending)[0] == 1
    assert await paying == ["REDIRECT", payment_id, 3]
    states = {row.attempt: row.state for row in payment_rows(race.town.core.url, payment_id)["channel_order"]}
    assert states == {1: AttemptState.CLOSED, 2: AttemptState.OPEN, 3: AttemptState.OPEN}


async def test_attempt_that_pay_takes_up_again_under_the_ender_is_not_ended(race: Race) -> None:
    """The ender has read that the attempt is to be ended, and is held before it takes its lease."""
    order_no, payment_id = await race.opened()
    await race.second.ask("pay", order_no=order_no, account="bank_b")
    race.first.shut(TO_LEASE)
    ending = race.first.ask("run", job="ender")
    await race.first.reached(TO_LEASE)
    assert await race.second.ask("pay", order_no=order_no, account="bank_a") == ["REDIRECT", payment_id, 1]
    race.first.open(TO_LEASE)
    await ending
    await race.first.ask("advance", by_ms=FIRST_REST_MS)
    await race.first.ask("run", job="ender")
    assert race.town.books(payment_id)["state"] == "NOT_PAID"
    assert ("END", 1) not in Repair(race.town.core).tasks(payment_id)


async def test_charge_in_progress_is_not_closed_by_a_clock_an_hour_ahead_and_not_charged_twice(race: Race) -> None:
    command = race.town.order(method=PayMethod.CHARGE)
    race.town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 3_000})
    payment_id = (await race.town.core.pay(command, within_ms=200)).payment.payment_id
    await race.first.ask("advance", by_ms=HOUR_MS)
    assert (await race.first.ask("run", job="closer"))[:2] == [0, 1]
    assert race.outcome(payment_id) is None
    verdicts = await race.town.hand_on(payment_id)
    assert [verdict.outcome.name for verdict in verdicts] == ["ACCEPTED"]
    await race.first.ask("run", job="recoverer")
    await race.settle(payment_id)
