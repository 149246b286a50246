"""The refunder over real banks: what is owed goes back once, whatever times out, refuses or dies on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import text

from paycore.domain.ids import excess_refund_no
from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome, PaymentState, RefundState
from tests.support.bank import CHANNEL_TIMEOUT_MS, LEASE_MS, Street, Town, a_town
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, change, check_money_rules
from tests.support.racers import Racer
from tests.support.repair import Repair
from tests.support.sweeping import Sweeps, delete_refunds

ONCE: dict[str, Any] = {"value": True, "times": 1}
BOTH = ((1, "bank_a"), (2, "bank_b"))


class Doubled(NamedTuple):
    """A payment that was paid at bank A and at bank B, where faults about its refund are planted."""

    payment_id: int
    trade_no: str
    refund_no: str

    def sent_no(self, seq: int) -> str:
        return f"{self.payment_id}{self.refund_no}{seq:02d}"


async def paid_twice(town: Town, **faults: Any) -> Doubled:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.plant(command, bank="bank_b", **faults)
    town.user_pays(payment_id, 1, "bank_a")
    (trade_no,) = town.user_pays(payment_id, 2, "bank_b")
    verdicts = await town.hand_on(payment_id, 1) + await town.hand_on(payment_id, 2)
    assert [verdict.outcome for verdict in verdicts] == [NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE]
    return Doubled(payment_id, trade_no, excess_refund_no(2, trade_no))


def bank_refunds(town: Town, doubled: Doubled) -> list[tuple[str, str]]:
    """The number and the result of each refund in bank B's books."""
    refunds = town.books(doubled.payment_id, 2, "bank_b")["refunds"]
    return [(refund["refund_no"], refund["result"]) for refund in refunds]


async def tries(town: Town, doubled: Doubled) -> list[tuple[int, RefundState]]:
    return [(row.seq, RefundState(row.state)) for row in (await town.file(doubled.payment_id)).refund_tries]


async def assert_back_once(town: Town, doubled: Doubled, seq: int = 1) -> None:
    """The user has the second payment back, the first is kept, and more passes move nothing."""
    for _ in range(2):
        refunded = [number for number, result in bank_refunds(town, doubled) if result == "REFUNDED"]
        assert refunded == [doubled.sent_no(seq)]
        assert town.kept_minor(doubled.payment_id, *BOTH) == AMOUNT_MINOR
        assert (await tries(town, doubled))[-1] == (seq, RefundState.REFUNDED)
        await town.refund()
    file = await town.file(doubled.payment_id)
    assert [(row.seq, row.result) for row in file.refund_results][-1] == (seq, RefundState.REFUNDED)
    assert len(file.refund_results) == seq
    check_money_rules(town.core.snapshot())


async def test_refund_is_sent_once_under_its_derived_number_and_names_its_trade(town: Town) -> None:
    doubled = await paid_twice(town)
    assert await tries(town, doubled) == [(1, RefundState.PENDING)]
    await town.refund()
    await assert_back_once(town, doubled)
    (refund,) = town.books(doubled.payment_id, 2, "bank_b")["refunds"]
    assert (refund["trade_no"], refund["amount_minor"]) == (doubled.trade_no, AMOUNT_MINOR)


NO_ANSWER: dict[str, Any] = {
    "refund_hangs_after_doing": {"hang_after_doing": {"refund": ONCE}},
    "refund_hangs_before_doing": {"hang_before_doing": {"refund": ONCE}},
    "refund_error": {"error_500": {"refund": ONCE}},
    "refund_error_after_doing": {"error_500_after_doing": {"refund": ONCE}},
    "refund_slow": {"answer_delay_ms": {"refund": {"value": 3 * CHANNEL_TIMEOUT_MS, "times": 1}}},
    "refund_nonsense": {"nonsense": {"refund": {"value": "wrong_number", "times": 1}}},
    "refund_missing_fields": {"nonsense": {"refund": {"value": "missing_fields", "times": 1}}},
    "query_hangs": {"hang_after_doing": {"refund": ONCE}, "hang_before_doing": {"query_refund": ONCE}},
    "query_error": {"hang_after_doing": {"refund": ONCE}, "error_500": {"query_refund": ONCE}},
    "query_nonsense": {
        "hang_after_doing": {"refund": ONCE},
        "nonsense": {"query_refund": {"value": "html", "times": 1}},
    },
    "both_hang_after_doing": {"hang_after_doing": {"refund": ONCE, "query_refund": {"value": True, "times": 2}}},
}


@pytest.mark.parametrize("fault", NO_ANSWER)
async def test_refund_without_an_answer_keeps_its_number_and_moves_the_money_once(town: Town, fault: str) -> None:
    doubled = await paid_twice(town, **NO_ANSWER[fault])
    await town.refund()
    assert await tries(town, doubled) == [(1, RefundState.UNKNOWN)]
    assert (await town.file(doubled.payment_id)).refund_results == []
    await town.refund(passes=3)
    await assert_back_once(town, doubled)
    assert len(bank_refunds(town, doubled)) == 1


async def test_refund_whose_answer_was_lost_is_asked_for_before_it_is_sent_again(town: Town) -> None:
    doubled = await paid_twice(town, hang_after_doing={"refund": ONCE})
    await town.refund()
    file = await town.file(doubled.payment_id)
    assert [row.state for row in file.refund_tries] == [RefundState.UNKNOWN]
    # From now on nothing that is sent arrives: only asking can end it.
    town.plant(
        town.order()._replace(subject=file.record.payment.subject), bank="bank_b", hang_before_doing={"refund": True}
    )
    await town.refund()
    await assert_back_once(town, doubled)


async def test_refund_that_never_gets_an_answer_never_gets_another_number(town: Town) -> None:
    doubled = await paid_twice(town, hang_after_doing={"refund": True, "query_refund": True})
    await town.refund(passes=4)
    assert await tries(town, doubled) == [(1, RefundState.UNKNOWN)]
    assert len(bank_refunds(town, doubled)) <= 1
    (row,) = (await town.file(doubled.payment_id)).refund_tries
    assert row.asks >= 4
    assert row.last_error


async def test_refund_without_an_answer_rests_longer_each_time(town: Town) -> None:
    doubled = await paid_twice(town, error_500={"refund": True})
    rests = []
    for _ in range(4):
        await town.refund()
        (row,) = (await town.file(doubled.payment_id)).refund_tries
        rests.append(row.next_at_ms - row.state_at_ms)
    assert rests == [1, 2, 4, 8]


async def test_refund_refused_for_good_is_sent_again_under_the_next_number(town: Town) -> None:
    doubled = await paid_twice(town, refuse={"refund": {"value": "NOT_NOW", "times": 1}})
    await town.refund()
    assert await tries(town, doubled) == [(1, RefundState.REFUSED), (2, RefundState.PENDING)]
    (result,) = (await town.file(doubled.payment_id)).refund_results
    assert (result.seq, result.result, result.code) == (1, RefundState.REFUSED, "NOT_NOW")
    await town.refund()
    await assert_back_once(town, doubled, seq=2)
    assert bank_refunds(town, doubled) == [(doubled.sent_no(1), "REFUSED"), (doubled.sent_no(2), "REFUNDED")]


async def test_refund_refused_behind_a_lost_answer_is_asked_for_before_the_next_number(town: Town) -> None:
    doubled = await paid_twice(town, refuse={"refund": ONCE}, hang_after_doing={"refund": ONCE})
    await town.refund()
    assert await tries(town, doubled) == [(1, RefundState.UNKNOWN)]
    await town.refund(passes=2)
    await assert_back_once(town, doubled, seq=2)


async def test_refund_only_accepted_is_followed_up_until_the_money_moved(town: Town) -> None:
    doubled = await paid_twice(town, refund_accepted_only={"result": "success", "delay_ms": 400})
    await town.refund()
    assert await tries(town, doubled) == [(1, RefundState.ACCEPTED)]
    async with asyncio.timeout(10):
        while town.kept_minor(doubled.payment_id, (2, "bank_b")):
            await asyncio.sleep(0.02)
    await town.refund()
    await assert_back_once(town, doubled)


async def test_refund_accepted_and_failed_later_is_sent_again_under_the_next_number(town: Town) -> None:
    later = {"value": {"result": "failure", "delay_ms": 300}, "times": 1}
    doubled = await paid_twice(town, refund_accepted_only=later)
    await town.refund()
    assert await tries(town, doubled) == [(1, RefundState.ACCEPTED)]
    async with asyncio.timeout(10):
        while bank_refunds(town, doubled)[0][1] != "REFUSED":
            await asyncio.sleep(0.02)
    await town.refund(passes=2)
    await assert_back_once(town, doubled, seq=2)


async def test_refunds_of_several_captures_each_go_back_once(town: Town) -> None:
    command = town.order()
    for bank in ("bank_a", "bank_b", "bank_c"):
        payment_id = (await town.core.pay(command._replace(account=bank))).payment.payment_id
    for attempt, bank in enumerate(("bank_a", "bank_b", "bank_c"), start=1):
        town.user_pays(payment_id, attempt, bank)
        await town.hand_on(payment_id, attempt)
    await town.refund(passes=2)
    kept = [town.kept_minor(payment_id, (n, bank)) for n, bank in enumerate(("bank_a", "bank_b", "bank_c"), start=1)]
    assert kept == [AMOUNT_MINOR, 0, 0]
    check_money_rules(town.core.snapshot())


# Refunds that are missing


@pytest.mark.parametrize("tables", [("refund", "refund_try"), ("refund",), ("refund", "refund_try", "refund_result")])
@pytest.mark.parametrize("when", ["before_it_was_sent", "after_it_was_sent"])
async def test_refund_that_is_missing_is_added_and_the_money_goes_back_once(
    town: Town, tables: tuple[str, ...], when: str
) -> None:
    doubled = await paid_twice(town)
    if when == "after_it_was_sent":
        await town.refund()
    delete_refunds(town.core.url, doubled.payment_id, tables=tables)
    await Sweeps(town.core).run()
    await town.refund()
    refunded = [number for number, result in bank_refunds(town, doubled) if result == "REFUNDED"]
    assert refunded == [doubled.sent_no(1)]
    assert town.kept_minor(doubled.payment_id, *BOTH) == AMOUNT_MINOR
    check_money_rules(town.core.snapshot())


async def test_kept_capture_beside_its_own_excess_row_is_never_refunded(town: Town) -> None:
    """What a stale index may leave behind: one capture both kept and excess. It is the kept one."""
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    (trade_no,) = town.user_pays(payment_id)
    await town.hand_on(payment_id)
    change(
        town.core.url,
        text(
            "INSERT INTO excess_payment SELECT payment_id, attempt, channel_trade_no, 3, amount_minor, currency,"
            " paid_at_ms, received_at_ms, source, recorded_at_ms, writer_no, group_no FROM payment_outcome"
        ),
    )
    await Sweeps(town.core).full()
    await town.refund()
    assert town.core.snapshot()["refund"] == set()
    assert town.kept_minor(payment_id, (1, "bank_a")) == AMOUNT_MINOR
    assert trade_no


# Expired payments that hold an excess


async def late_beside_a_live_attempt(town: Town, **faults: Any) -> int:
    """Bank A took money after expiry while bank B's page still stands open."""
    command = town.order()
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.plant(command, bank="bank_b", **faults)
    expired_ms = town.clock.now_ms() + VALIDITY_MS + 10_000
    town.clock.advance(VALIDITY_MS + 10_000)
    town.user_pays(payment_id, 1, "bank_a", paid_at_ms=expired_ms)
    (verdict,) = await town.hand_on(payment_id)
    assert verdict.outcome == NotifyOutcome.LATE
    assert (await town.file(payment_id)).refunds == []
    return payment_id


async def test_expired_payment_that_holds_an_excess_is_refunded_once_the_closer_has_closed_it(town: Town) -> None:
    payment_id = await late_beside_a_live_attempt(town)
    await town.refund()
    file = await town.file(payment_id)
    assert (file.record.outcome, file.refunds) == (None, [])
    assert town.kept_minor(payment_id, *BOTH) == AMOUNT_MINOR
    await Repair(town.core).run("closer")
    await town.refund()
    record = (await town.file(payment_id)).record
    assert record.outcome is not None
    assert (record.outcome.state, record.outcome.close_reason) == (PaymentState.CLOSED, CloseReason.EXPIRED)
    assert record.attempts[2].state == AttemptState.CLOSED
    assert town.kept_minor(payment_id, *BOTH) == 0
    check_money_rules(town.core.snapshot())


async def test_expired_payment_whose_other_bank_was_paid_in_time_keeps_that_money(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.plant(command, bank="bank_b", notify_never=True)
    town.user_pays(payment_id, 2, "bank_b")
    town.clock.advance(VALIDITY_MS + 10_000)
    town.user_pays(payment_id, 1, "bank_a", paid_at_ms=town.clock.now_ms())
    await town.hand_on(payment_id)
    await Repair(town.core).run("closer")
    await town.refund()
    record = (await town.file(payment_id)).record
    assert record.outcome is not None
    assert (record.outcome.state, record.outcome.attempt) == (PaymentState.PAID, 2)
    assert town.kept_minor(payment_id, (1, "bank_a")) == 0
    assert town.kept_minor(payment_id, (2, "bank_b")) == AMOUNT_MINOR
    check_money_rules(town.core.snapshot())


# Several refunders, and dying ones


@pytest.mark.parametrize(
    "faults", [{}, {"hang_after_doing": {"refund": ONCE}}, {"answer_delay_ms": {"refund": 200}}], ids=str
)
async def test_two_refunders_at_once_send_the_money_back_once(
    street: Street, town: Town, faults: dict[str, Any]
) -> None:
    doubled = await paid_twice(town, **faults)
    async with a_town(town.core.url, street) as other:
        for _ in range(3):
            await asyncio.gather(
                town.core.refunder.run_once(), other.core.refunder.run_once(), town.core.a_refunder().run_once()
            )
            for one in (town, other):
                one.clock.advance(1_000)
    await assert_back_once(town, doubled)
    assert len(bank_refunds(town, doubled)) == 1


async def test_refunder_whose_lease_ran_out_writes_nothing_over_its_successor(
    street: Street, patient_town: Town
) -> None:
    town = patient_town
    doubled = await paid_twice(town, answer_delay_ms={"refund": {"value": 1_500, "times": 1}})
    slow = asyncio.create_task(town.core.refunder.run_once())
    async with asyncio.timeout(10):
        while not bank_refunds(town, doubled):
            await asyncio.sleep(0.01)
    async with a_town(town.core.url, street) as other:
        other.clock.advance(LEASE_MS + 1_000)
        await other.core.refunder.run_once()
        assert await tries(other, doubled) == [(1, RefundState.REFUNDED)]
    assert not slow.done()
    with town.core.watch() as written:
        await slow
    assert written.tables == {}
    await assert_back_once(town, doubled)


@pytest.mark.parametrize("point", ["refunder.before_send", "refunder.after_send"])
async def test_refunder_killed_between_sending_and_its_answer_sends_the_money_back_once(
    street: Street, town: Town, tmp_path: Path, point: str
) -> None:
    doubled = await paid_twice(town)
    doomed = await Racer(town.core.url, tmp_path / "racer", bank_url=street.bank.url, **{point: "crash"}).start()
    try:
        assert await doomed.ask("refund") == "DEAD"
        assert await doomed.wait_dead() == -9
    finally:
        await doomed.stop()
    assert len(bank_refunds(town, doubled)) == (1 if point == "refunder.after_send" else 0)
    assert await tries(town, doubled) == [(1, RefundState.UNKNOWN)]
    # Its lease still stands: nobody else touches the try before it has run out.
    await town.refund()
    assert await tries(town, doubled) == [(1, RefundState.UNKNOWN)]
    town.clock.advance(LEASE_MS)
    await town.refund(passes=2)
    await assert_back_once(town, doubled)
    assert len(bank_refunds(town, doubled)) == 1


async def test_refund_of_an_account_that_is_not_configured_waits_for_it(street: Street, town: Town) -> None:
    doubled = await paid_twice(town)
    async with a_town(town.core.url, street, accounts=("bank_a",)) as other:
        await other.core.refunder.run_once()
    assert await tries(town, doubled) == [(1, RefundState.PENDING)]
    await town.refund(passes=2)
    await assert_back_once(town, doubled)
