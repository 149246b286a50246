"""The closer over real banks: it closes what nobody paid, and nothing else, whatever channels and clocks do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from paycore.domain.errors import ChannelUnavailableError
from paycore.domain.verdicts import AttemptState, CaptureSource, CloseReason, NotifyOutcome, PaymentState, PayMethod
from paycore.jobs.runner import Pass
from paycore.jobs.task_job import FIRST_REST_MS, LONGEST_REST_MS
from paycore.store.rows import OutcomeRow
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from tests.support.bank import Street, Town, a_town
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, check_money_rules
from tests.support.databases import make_database
from tests.support.repair import UNREACHABLE_MS, Repair, Watched, left, pass_time

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
ONCE: dict[str, Any] = {"value": True, "times": 1}
CLOSE = ("CLOSE", 0)


@pytest.fixture
def repair(town: Town) -> Repair:
    return Repair(town.core)


async def opened(town: Town, *banks: str, **faults: Any) -> int:
    """A payment with an open page at each bank; faults are planted at all of them afterwards."""
    command = town.order()
    for bank in banks or ("bank_a",):
        result = await town.core.pay(command._replace(account=bank))
    for bank in banks or ("bank_a",):
        town.plant(command, bank=bank, **faults)
    payment_id: int = result.payment.payment_id
    return payment_id


async def outcome(town: Town, payment_id: int) -> OutcomeRow | None:
    return (await town.file(payment_id)).record.outcome


async def closed_because(town: Town, payment_id: int) -> CloseReason | None:
    """Why a payment is closed; None where it is open or paid."""
    row = await outcome(town, payment_id)
    return CloseReason(row.close_reason) if row is not None and row.state == PaymentState.CLOSED else None


async def test_closer_closes_a_payment_at_its_expiry_and_not_before(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, "bank_a", "bank_b")
    watched = Watched(town, payment_id)
    task = repair.tasks(payment_id)[CLOSE]
    payment = (await town.file(payment_id)).record.payment
    assert task.next_at_ms == payment.expire_at_ms + 1
    town.clock.advance(task.next_at_ms - town.clock.now_ms() - 2_000)
    assert await repair.run("closer") == [Pass()]
    assert watched.queries == 0
    town.clock.advance(2_000)
    assert await repair.run("closer") == [Pass(done=1)]
    file = await town.file(payment_id)
    assert await closed_because(town, payment_id) == CloseReason.EXPIRED
    assert {row.state for row in file.record.attempts.values()} == {AttemptState.CLOSED}
    assert town.books(payment_id)["state"] == town.books(payment_id, 2, "bank_b")["state"] == "CLOSED"
    assert CLOSE not in repair.tasks(payment_id)


async def test_closer_waits_for_the_late_grace(street: Street, db_url: str) -> None:
    async with a_town(db_url, street, late_grace_ms=30_000) as town:
        repair = Repair(town.core)
        payment_id = await opened(town)
        town.clock.advance(VALIDITY_MS + 20_000)
        await repair.run("closer")
        assert await outcome(town, payment_id) is None
        town.clock.advance(11_000)
        await repair.run("closer")
        assert await closed_because(town, payment_id) == CloseReason.EXPIRED


async def test_closer_keeps_money_that_was_never_notified(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, "bank_a", "bank_b", notify_never=True)
    (trade_no,) = town.user_pays(payment_id, 2, "bank_b")
    town.clock.advance(VALIDITY_MS + 1)
    await repair.run("closer")
    kept = await outcome(town, payment_id)
    assert kept is not None
    assert (kept.state, kept.channel_trade_no) == (PaymentState.PAID, trade_no)
    assert kept.source == CaptureSource.QUERY
    assert {(row.payment_id, row.attempt) for row in town.core.snapshot()["queried_paid"]} == {(payment_id, 2)}
    # The other page is closed, so that nobody pays there too.
    assert town.books(payment_id)["state"] == "CLOSED"
    assert CLOSE not in repair.tasks(payment_id)


async def test_closer_that_is_told_already_paid_keeps_the_money(street: Street, db_url: str) -> None:
    """The user pays between the query and the close."""
    async with a_town(db_url, street, timeout_ms=15_000) as town:
        repair = Repair(town.core)
        payment_id = await opened(town, answer_delay_ms={"query": {"value": 500, "times": 1}}, notify_never=True)
        town.clock.advance(VALIDITY_MS + 1)
        closing = asyncio.create_task(repair.run("closer"))
        async with asyncio.timeout(10):
            while left(town, payment_id, "answer_delay_ms.query"):
                await asyncio.sleep(0.005)
        # The bank has read its books for the query and holds the answer back.
        town.user_pays(payment_id)
        await closing
        kept = await outcome(town, payment_id)
        assert kept is not None
        assert kept.state == PaymentState.PAID


NO_WORD: dict[str, dict[str, Any]] = {
    "query_error": {"error_500": {"query": ONCE}},
    "query_hangs": {"hang_before_doing": {"query": ONCE}},
    "query_is_slow": {"answer_delay_ms": {"query": {"value": 2_000, "times": 1}}},
    "query_nonsense": {"nonsense": {"query": {"value": "unknown_word", "times": 1}}},
    "close_error": {"error_500": {"close": ONCE}},
    "close_in_progress": {"refuse": {"close": ONCE}},
    "close_done_and_unanswered": {"hang_after_doing": {"close": ONCE}},
}


@pytest.mark.parametrize("fault", NO_WORD)
async def test_closer_without_a_final_word_leaves_the_payment_open_and_comes_back(
    town: Town, repair: Repair, fault: str
) -> None:
    payment_id = await opened(town, **NO_WORD[fault])
    town.clock.advance(VALIDITY_MS + 1)
    before_ms = town.clock.now_ms()
    assert await repair.run("closer") == [Pass(put_off=1)]
    assert await outcome(town, payment_id) is None
    assert (await town.file(payment_id)).record.attempts[1].state == AttemptState.OPEN
    task = repair.tasks(payment_id)[CLOSE]
    assert task.looks == 1
    assert task.last_error
    assert before_ms + FIRST_REST_MS <= task.next_at_ms <= town.clock.now_ms() + FIRST_REST_MS
    town.clock.advance(FIRST_REST_MS)
    assert await repair.run("closer") == [Pass(done=1)]
    assert await closed_because(town, payment_id) == CloseReason.EXPIRED


async def test_closer_rests_longer_each_time(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, error_500={"query": True})
    town.clock.advance(VALIDITY_MS + 1)
    rests = []
    for _ in range(9):
        now_ms = town.clock.now_ms()
        await repair.run("closer")
        task = repair.tasks(payment_id)[CLOSE]
        rests.append((task.next_at_ms - now_ms) // 1_000)
        town.clock.advance(task.next_at_ms - town.clock.now_ms())
    assert rests == [5, 10, 20, 40, 80, 160, 320, 600, 600]


async def test_closer_asks_every_attempt_although_one_channel_is_silent(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, "bank_a", "bank_b", notify_never=True)
    town.driver.plant(order_no=f"{payment_id}01", bank="bank_a", error_500={"query": True})
    town.user_pays(payment_id, 2, "bank_b")
    town.clock.advance(VALIDITY_MS + 1)
    assert await repair.run("closer") == [Pass(done=1)]
    kept = await outcome(town, payment_id)
    assert kept is not None
    assert (kept.state, kept.attempt) == (PaymentState.PAID, 2)


async def test_closer_leaves_a_charge_in_progress_open_and_keeps_what_it_comes_to(town: Town, repair: Repair) -> None:
    command = town.order(method=PayMethod.CHARGE)
    town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 1_500}, notify_never=True)
    payment_id = (await town.core.pay(command, within_ms=200)).payment.payment_id
    # A clock that jumps far ahead makes the payment look expired.
    town.clock.advance(VALIDITY_MS + HOUR_MS)
    assert await repair.run("closer") == [Pass(put_off=1)]
    assert await outcome(town, payment_id) is None
    async with asyncio.timeout(10):
        while town.books(payment_id)["state"] != "PAID":
            await asyncio.sleep(0.02)
    town.clock.advance(FIRST_REST_MS)
    await repair.run("closer")
    kept = await outcome(town, payment_id)
    assert kept is not None
    assert kept.state == PaymentState.PAID


async def test_closer_waits_with_an_order_that_the_bank_does_not_know(town: Town, repair: Repair) -> None:
    """Not-exist is neither failed nor closed: some channels learn of an order only when the user scans."""
    command = town.order()
    town.plant(command, hang_before_doing={"create": ONCE})
    with pytest.raises(ChannelUnavailableError):
        await town.core.pay(command)
    (payment,) = town.core.snapshot()["payment"]
    town.clock.advance(VALIDITY_MS + 1)
    assert await repair.run("closer") == [Pass(put_off=1)]
    assert await outcome(town, payment.payment_id) is None
    await pass_time(town, repair, NOT_EXIST_MARGIN_MS + LONGEST_REST_MS, "closer")
    assert await closed_because(town, payment.payment_id) == CloseReason.EXPIRED


async def test_closer_releases_the_refund_of_late_money_once_no_other_attempt_is_live(
    town: Town, repair: Repair
) -> None:
    """Paid after expiry at one bank while the other page was open: the payment could still be kept there."""
    payment_id = await opened(town, "bank_a", "bank_b")
    expire_at_ms = (await town.file(payment_id)).record.payment.expire_at_ms
    town.clock.advance(VALIDITY_MS + 60_000)
    town.user_pays(payment_id, 1, "bank_a", paid_at_ms=expire_at_ms + 30_000)
    (verdict,) = await town.hand_on(payment_id)
    assert verdict.outcome == NotifyOutcome.LATE
    file = await town.file(payment_id)
    assert (file.record.outcome, file.refunds) == (None, [])
    await repair.run("closer")
    assert await closed_because(town, payment_id) == CloseReason.EXPIRED
    await town.refund()
    assert town.kept_minor(payment_id, (1, "bank_a"), (2, "bank_b")) == 0
    check_money_rules(town.core.snapshot())


async def test_closer_gives_up_a_silent_channel_after_the_limit_and_late_money_goes_back(
    town: Town, repair: Repair
) -> None:
    payment_id = await opened(town, error_500={"query": True}, notify_held=True)
    town.clock.advance(UNREACHABLE_MS)
    await repair.run("closer")
    assert await outcome(town, payment_id) is None
    town.clock.advance(VALIDITY_MS + LONGEST_REST_MS)
    await repair.run("closer")
    assert await closed_because(town, payment_id) == CloseReason.UNREACHABLE
    assert CLOSE not in repair.tasks(payment_id)
    assert town.core.count("paycore_closed_unreachable_total") == 1
    # The page was open all the time.
    (trade_no,) = town.user_pays(payment_id)
    verdict = await town.core.notify(town.core.word(payment_id, 1, trade_no))
    assert verdict.outcome == NotifyOutcome.LATE
    await town.refund()
    assert town.books(payment_id)["kept_minor"] == 0
    check_money_rules(town.core.snapshot())


async def test_closer_that_gives_up_asks_once_more_and_keeps_what_was_paid(town: Town, repair: Repair) -> None:
    payment_id = await opened(town, notify_never=True)
    town.user_pays(payment_id)
    town.clock.advance(UNREACHABLE_MS + VALIDITY_MS + 1)
    await repair.run("closer")
    kept = await outcome(town, payment_id)
    assert kept is not None
    assert kept.state == PaymentState.PAID
    assert town.core.count("paycore_closed_unreachable_total") == 0


@pytest.mark.parametrize("hours", [-8, 8])
@pytest.mark.parametrize("job", ["closer", "recoverer"])
async def test_pay_time_read_in_the_wrong_zone_refunds_nothing(
    street: Street, db_url: str, hours: int, job: str
) -> None:
    """An adapter that reads Beijing time as UTC, or the other way round, must not refund a whole day."""
    async with a_town(db_url, street, timeout_ms=15_000) as town:
        payment_ids = [await opened(town, notify_never=True) for _ in range(3)]
        for payment_id in payment_ids:
            town.user_pays(payment_id, paid_at_ms=town.clock.now_ms() + hours * HOUR_MS)
        town.clock.advance(VALIDITY_MS + 1)
        await Repair(town.core).run(job)
        rows = town.core.snapshot()
        assert {(row.payment_id, row.state, row.paid_at_untrusted) for row in rows["payment_outcome"]} == {
            (payment_id, PaymentState.PAID, 1) for payment_id in payment_ids
        }
        assert not rows["excess_payment"]
        assert not rows["refund"]


async def test_clock_an_hour_ahead_closes_nothing_that_the_bank_can_still_be_paid_for(
    town: Town, repair: Repair
) -> None:
    """What is closed by mistake is closed at the bank first; money that came before is kept, money after goes back."""
    unpaid = await opened(town, take_after_close=True)
    paid = await opened(town, notify_never=True)
    town.user_pays(paid)
    town.clock.advance(HOUR_MS)
    await repair.run()
    assert town.books(unpaid)["state"] == "CLOSED"
    assert await closed_because(town, unpaid) == CloseReason.EXPIRED
    kept = await outcome(town, paid)
    assert kept is not None
    assert kept.state == PaymentState.PAID
    town.clock.advance(-HOUR_MS)
    town.user_pays(unpaid)
    (verdict,) = await town.hand_on(unpaid)
    assert verdict.outcome == NotifyOutcome.LATE
    await repair.run()
    await town.refund()
    assert town.books(unpaid)["kept_minor"] == 0
    assert town.books(paid)["kept_minor"] == AMOUNT_MINOR
    check_money_rules(town.core.snapshot())


async def test_clock_an_hour_back_closes_late_and_never_early(town: Town, repair: Repair) -> None:
    payment_id = await opened(town)
    town.clock.advance(VALIDITY_MS - HOUR_MS)
    await repair.run()
    assert await outcome(town, payment_id) is None
    town.clock.advance(HOUR_MS + 1)
    await repair.run()
    assert await closed_because(town, payment_id) == CloseReason.EXPIRED


async def test_two_closers_at_once_close_each_payment_once(town: Town) -> None:
    payment_ids = [await opened(town) for _ in range(8)]
    town.clock.advance(VALIDITY_MS + 1)
    first, second = Repair(town.core), Repair(town.core)
    passes = await asyncio.gather(first.closer.run_once(), second.closer.run_once())
    assert sum(one.done for one in passes) == len(payment_ids)
    for payment_id in payment_ids:
        assert await closed_because(town, payment_id) == CloseReason.EXPIRED
        assert CLOSE not in first.tasks(payment_id)


async def test_finished_payments_are_dropped_without_asking_the_bank(town: Town, repair: Repair) -> None:
    payment_ids = [await opened(town) for _ in range(5)]
    for payment_id in payment_ids:
        await town.core.notify(town.core.word(payment_id, 1, f"T{payment_id}"))
    watched = Watched(town, payment_ids[0])
    town.clock.advance(VALIDITY_MS + DAY_MS)
    told: list[tuple[int, int]] = []
    done = await repair.closer.run_once(lambda done, known: told.append((done, known)))
    assert done == Pass(done=5)
    assert told[-1] == (5, 5)
    assert await repair.run("recoverer") == [Pass(done=5)]
    assert watched.queries == 0
    assert not any(repair.tasks(payment_id) for payment_id in payment_ids)


async def test_bank_that_is_down_for_a_day_is_not_hammered_and_all_is_settled_after_it(
    street: Street, tmp_path: Path
) -> None:
    """While it is silent, one call after each rest finds out whether it answers again; the others are not made."""
    async with a_town(make_database("sqlite", tmp_path), street) as town:
        repair = Repair(town.core)
        command = town.order()
        many = 1_000_000
        payment_ids = []
        for number in range(12):
            of_number = command._replace(merchant_order_no=f"{command.merchant_order_no}-{number}")
            payment_ids.append((await town.core.pay(of_number)).payment.payment_id)
        town.plant(command, error_500={"query": {"value": True, "times": many}}, notify_never=True)
        town.user_pays(payment_ids[0])
        asked = []
        for _ in range(24):
            before = left(town, payment_ids[0], "error_500.query")
            await pass_time(town, repair, HOUR_MS, most_ms=HOUR_MS)
            asked.append(before - left(town, payment_ids[0], "error_500.query"))
        # Until it counts as silent it is asked what is due; then once by each of the jobs.
        assert asked[0] <= len(payment_ids)
        assert max(asked[1:]) <= 2
        assert sum(asked) > 24
        town.plant(command, error_500={"query": {"value": True, "times": 1}})
        await pass_time(town, repair, 3 * LONGEST_REST_MS)
        states = {payment_id: (await town.file(payment_id)).record.state for payment_id in payment_ids}
        assert states.pop(payment_ids[0]) == PaymentState.PAID
        assert set(states.values()) == {PaymentState.CLOSED}
