"""Sweeps beside real banks: each kind of what can be missing is planted, found, counted and put right."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from paycore.domain.ids import excess_refund_no
from paycore.domain.verdicts import CloseReason, NotifyOutcome, PaymentState, RefundState, TaskKind
from tests.support.bank import Town
from tests.support.books import rows, run
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, check_money_rules
from tests.support.planted_rows import insert
from tests.support.planting import PLANTS, prepare
from tests.support.sweep_finds import REPAIRED
from tests.support.sweeping import Sweeps, delete_refunds

BOTH = ((1, "bank_a"), (2, "bank_b"))
A_MINUTE_MS = 60_000


class Doubled(NamedTuple):
    """A payment that was paid at bank A and at bank B."""

    payment_id: int
    trade_no: str

    @property
    def refund_no(self) -> str:
        return excess_refund_no(2, self.trade_no)


async def paid_twice(town: Town) -> Doubled:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.user_pays(payment_id, 1, "bank_a")
    (trade_no,) = town.user_pays(payment_id, 2, "bank_b")
    verdicts = await town.hand_on(payment_id, 1) + await town.hand_on(payment_id, 2)
    assert [verdict.outcome for verdict in verdicts] == [NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE]
    return Doubled(payment_id, trade_no)


async def send_back(town: Town) -> None:
    """The refunder does its part."""
    for _ in range(2):
        await town.core.refunder.run_once()
        town.clock.advance(1_000)


async def paid_and_closed(town: Town) -> int:
    """Paid after its expiry: closed, and the capture is excess."""
    payment_id: int = (await town.core.pay(town.order())).payment.payment_id
    town.clock.advance(VALIDITY_MS + 10_000)
    town.user_pays(payment_id, paid_at_ms=town.clock.now_ms())
    (verdict,) = await town.hand_on(payment_id)
    assert verdict.outcome == NotifyOutcome.LATE
    return payment_id


async def test_healthy_traffic_leaves_nothing_to_be_found(town: Town) -> None:
    sweeps = Sweeps(town.core, full_ms=1)
    await sweeps.run()
    await paid_twice(town)
    await town.core.pay(town.order())
    await sweeps.run()
    await paid_and_closed(town)
    await send_back(town)
    result = await sweeps.run(passes=2)
    assert sweeps.found() == {}
    assert (result.done, result.put_off, result.lag_ms) == (0, 0, 0)
    assert sweeps.pending() == []


@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
async def test_second_capture_whose_refund_is_missing_goes_back(town: Town, full: bool) -> None:
    sweeps = Sweeps(town.core)
    if not full:
        await sweeps.run()
    doubled = await paid_twice(town)
    delete_refunds(town.core.url, doubled.payment_id)
    await sweeps.run()
    assert sweeps.found() == {"several_captures": 1}
    assert town.core.count("paycore_refunds_total", reason="DUPLICATE", state="PENDING") == 2
    await send_back(town)
    assert town.kept_minor(doubled.payment_id, *BOTH) == AMOUNT_MINOR
    check_money_rules(town.core.snapshot())
    await sweeps.run()
    await sweeps.full()
    assert sweeps.found() == {"several_captures": 1}


@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
async def test_capture_of_a_closed_payment_whose_refund_is_missing_goes_back(town: Town, full: bool) -> None:
    sweeps = Sweeps(town.core)
    if not full:
        await sweeps.run()
    payment_id = await paid_and_closed(town)
    delete_refunds(town.core.url, payment_id)
    await sweeps.run()
    assert sweeps.found() == {"closed_with_capture": 1}
    await send_back(town)
    assert town.kept_minor(payment_id, (1, "bank_a")) == 0
    check_money_rules(town.core.snapshot())


def note_queried_paid(town: Town, payment_id: int, attempt: int = 1) -> None:
    """The channel's word was noted, and whoever asked died before the money was judged."""
    writer_no, group_no = rows(
        town.core.url, f"SELECT writer_no, group_no FROM payment WHERE payment_id = {payment_id}"
    )[0]
    note = insert("queried_paid", town.clock.now_ms(), payment_id=payment_id, attempt=attempt)
    run(
        town.core.url,
        note,
        f"UPDATE queried_paid SET writer_no = {writer_no}, group_no = {group_no} WHERE payment_id = {payment_id}",
    )


async def lost_word(town: Town, **faults: Any) -> int:
    """Paid at the bank, which was asked about it; nothing of the money is on record."""
    command = town.order()
    town.plant(command, notify_never=True, **faults)
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    town.user_pays(payment_id)
    note_queried_paid(town, payment_id)
    return payment_id


@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
async def test_money_that_the_channel_named_and_nobody_judged_is_judged(town: Town, full: bool) -> None:
    sweeps = Sweeps(town.core)
    if not full:
        await sweeps.run()
    payment_id = await lost_word(town)
    await sweeps.run()
    assert (sweeps.found(), sweeps.pending()) == ({}, [payment_id]), "it may be judged this very moment"
    town.clock.advance(A_MINUTE_MS)
    await sweeps.run()
    assert sweeps.found() == {"paid_at_channel": 1}
    assert (await town.file(payment_id)).record.state == PaymentState.PAID
    await sweeps.run()
    assert (sweeps.found(), sweeps.pending()) == ({"paid_at_channel": 1}, [])


async def test_money_that_the_channel_named_for_a_closed_payment_goes_back(town: Town) -> None:
    command = town.order()
    town.plant(command, notify_never=True)
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.closer.close_payment(payment_id, CloseReason.MERCHANT)
    town.plant(command, notify_never=True, take_after_close=True)
    town.user_pays(payment_id)
    note_queried_paid(town, payment_id)
    sweeps = Sweeps(town.core)
    town.clock.advance(A_MINUTE_MS)
    await sweeps.run()
    assert sweeps.found() == {"paid_at_channel": 1}
    await send_back(town)
    assert town.kept_minor(payment_id, (1, "bank_a")) == 0
    check_money_rules(town.core.snapshot())


async def test_channel_that_gives_no_answer_is_asked_again_until_it_does(town: Town) -> None:
    sweeps = Sweeps(town.core)
    payment_id = await lost_word(town, error_500={"query": {"value": True, "times": 2}})
    town.clock.advance(A_MINUTE_MS + 5_000)
    for _ in range(2):
        result = await sweeps.run()
        assert (result.put_off, sweeps.found(), sweeps.pending()) == (1, {}, [payment_id])
        assert result.lag_ms >= 5_000
    result = await sweeps.run()
    assert (result.put_off, result.lag_ms, sweeps.found()) == (0, 0, {"paid_at_channel": 1})


async def test_channel_that_takes_back_what_it_said_is_told_to_a_person_once(town: Town) -> None:
    sweeps = Sweeps(town.core)
    await sweeps.run()
    payment_id = (await town.core.pay(town.order())).payment.payment_id
    note_queried_paid(town, payment_id)
    town.clock.advance(A_MINUTE_MS)
    await sweeps.run(passes=3)
    assert sweeps.found() == {"contradiction": 1}
    assert (await town.file(payment_id)).record.state == PaymentState.OPEN


async def test_word_that_lies_in_quarantine_is_not_asked_for_again(town: Town) -> None:
    sweeps = Sweeps(town.core)
    payment_id = (await town.core.pay(town.order())).payment.payment_id
    note_queried_paid(town, payment_id)
    await town.core.notify(town.core.word(payment_id, amount_minor=1))
    town.clock.advance(A_MINUTE_MS)
    await sweeps.run()
    await sweeps.full()
    assert (sweeps.found(), sweeps.pending()) == ({}, [])


async def late_beside_a_live_attempt(town: Town) -> int:
    """Bank A took money after expiry while bank B's page still stands open."""
    command = town.order()
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.clock.advance(VALIDITY_MS + 10_000)
    town.user_pays(payment_id, 1, "bank_a", paid_at_ms=town.clock.now_ms())
    (verdict,) = await town.hand_on(payment_id)
    assert verdict.outcome == NotifyOutcome.LATE
    return payment_id


def close_tasks(town: Town) -> list[tuple[int, int]]:
    """(payment, when it is due) of what the closer is going to do."""
    return rows(town.core.url, f"SELECT payment_id, next_at_ms FROM task WHERE kind = {TaskKind.CLOSE:d}")


@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
async def test_expired_payment_with_excess_that_nobody_would_close_is_given_to_the_closer(
    town: Town, full: bool
) -> None:
    sweeps = Sweeps(town.core)
    if not full:
        await sweeps.run()
    payment_id = await late_beside_a_live_attempt(town)
    run(town.core.url, f"DELETE FROM task WHERE kind = {TaskKind.CLOSE:d}")
    await sweeps.run()
    assert sweeps.found() == {"expired_with_excess": 1}
    ((closed, next_at_ms),) = close_tasks(town)
    assert closed == payment_id
    assert next_at_ms <= town.clock.now_ms()
    assert sweeps.pending() == [payment_id], "its refund waits for the outcome"
    assert (await town.file(payment_id)).refunds == []


async def test_excess_that_waits_is_looked_at_until_its_refund_is_there(town: Town) -> None:
    sweeps = Sweeps(town.core)
    payment_id = await late_beside_a_live_attempt(town)
    await sweeps.run()
    assert (sweeps.found(), sweeps.pending()) == ({}, [payment_id])
    await town.core.closer.close_payment(payment_id, CloseReason.MERCHANT)
    delete_refunds(town.core.url, payment_id)
    await sweeps.run()
    assert (sweeps.found(), sweeps.pending()) == ({"closed_with_capture": 1}, [])
    await send_back(town)
    assert town.kept_minor(payment_id, *BOTH) == 0
    check_money_rules(town.core.snapshot())


async def test_excess_that_waits_makes_a_closing_that_rests_due_once(town: Town) -> None:
    sweeps = Sweeps(town.core)
    payment_id = await late_beside_a_live_attempt(town)
    later_ms = town.clock.now_ms() + 600_000
    run(town.core.url, f"UPDATE task SET next_at_ms = {later_ms} WHERE kind = {TaskKind.CLOSE:d}")
    await sweeps.run()
    ((_, next_at_ms),) = close_tasks(town)
    assert next_at_ms <= town.clock.now_ms()
    run(town.core.url, f"UPDATE task SET next_at_ms = {later_ms} WHERE kind = {TaskKind.CLOSE:d}")
    await sweeps.run()
    assert close_tasks(town) == [(payment_id, later_ms)], "a channel that is down is not asked each time"
    assert sweeps.found() == {}


@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
async def test_refund_without_a_try_is_sent(town: Town, full: bool) -> None:
    sweeps = Sweeps(town.core)
    if not full:
        await sweeps.run()
    doubled = await paid_twice(town)
    delete_refunds(town.core.url, doubled.payment_id, tables=["refund_try"])
    await sweeps.run()
    assert sweeps.found() == {"refund_without_try": 1}
    await send_back(town)
    assert town.kept_minor(doubled.payment_id, *BOTH) == AMOUNT_MINOR
    assert [row.seq for row in (await town.file(doubled.payment_id)).refund_tries] == [1]


async def refused(town: Town, *, word: RefundState | None) -> Doubled:
    """The first try was refused for good, and nobody made the next one."""
    doubled = await paid_twice(town)
    run(town.core.url, f"UPDATE refund_try SET state = {RefundState.REFUSED:d} WHERE payment_id = {doubled.payment_id}")
    if word is not None:
        run(
            town.core.url,
            insert(
                "refund_result",
                town.clock.now_ms(),
                payment_id=doubled.payment_id,
                refund_no=doubled.refund_no,
                seq=1,
                result=word,
                code="",
                message="",
            ),
        )
    return doubled


async def test_refund_that_was_refused_and_never_tried_again_is_sent_under_the_next_number(town: Town) -> None:
    sweeps = Sweeps(town.core)
    doubled = await refused(town, word=RefundState.REFUSED)
    await sweeps.full()
    assert sweeps.found() == {"refund_stuck": 1}
    await send_back(town)
    assert town.kept_minor(doubled.payment_id, *BOTH) == AMOUNT_MINOR
    assert [row.seq for row in (await town.file(doubled.payment_id)).refund_tries] == [1, 2]


@pytest.mark.parametrize("word", [None, RefundState.REFUNDED, RefundState.RETURNED_BY_CHANNEL])
async def test_refund_without_a_final_refusal_gets_no_further_number(town: Town, word: RefundState | None) -> None:
    """R6: nothing is sent under a new number before a final word on the old one, nor after the money went back.

    The refunder leaves a try alone that says that it is over, so a person has to be told.
    """
    sweeps = Sweeps(town.core)
    doubled = await refused(town, word=word)
    await sweeps.full()
    assert sweeps.found().keys() == {"contradiction"}
    assert [row.seq for row in (await town.file(doubled.payment_id)).refund_tries] == [1]


@pytest.mark.parametrize("kind", [TaskKind.CLOSE, TaskKind.QUERY])
@pytest.mark.parametrize("full", [False, True], ids=["incremental", "full"])
async def test_payment_that_nobody_would_come_back_to_gets_its_task(town: Town, full: bool, kind: TaskKind) -> None:
    sweeps = Sweeps(town.core)
    if not full:
        await sweeps.run()
    payment_id = (await town.core.pay(town.order())).payment.payment_id
    before = rows(town.core.url, "SELECT payment_id, kind, attempt, slice FROM task ORDER BY kind")
    run(town.core.url, f"DELETE FROM task WHERE kind = {kind:d}")
    await sweeps.run()
    assert sweeps.found() == {"payment_without_task": 1}
    assert rows(town.core.url, "SELECT payment_id, kind, attempt, slice FROM task ORDER BY kind") == before
    assert payment_id == before[0][0]


async def test_other_attempt_of_a_paid_payment_is_asked_about_too(town: Town) -> None:
    """The user may pay there as well, and that word may get lost."""
    sweeps = Sweeps(town.core)
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    town.user_pays(payment_id, 1)
    await town.hand_on(payment_id)
    run(town.core.url, "DELETE FROM task")
    await sweeps.run()
    assert sweeps.found() == {"payment_without_task": 1}
    assert rows(town.core.url, "SELECT kind, attempt FROM task") == [(TaskKind.QUERY, 2)]


async def test_attempt_that_was_asked_about_to_the_end_is_not_taken_up_again(town: Town) -> None:
    sweeps = Sweeps(town.core)
    await sweeps.run()
    await town.core.pay(town.order())
    town.clock.advance(VALIDITY_MS + 1)
    run(town.core.url, f"DELETE FROM task WHERE kind = {TaskKind.QUERY:d}")
    await sweeps.run()
    town.clock.advance(2 * 86_400_000)
    await sweeps.run()
    assert sweeps.found() == {}


# Everything at once


def rows_of(town: Town, payment_id: int) -> dict[str, list[Any]]:
    """What is on record about one payment, but for what repair comes back to."""
    names = ("payment", "payment_outcome", "excess_payment", "refund", "refund_try", "refund_result", "channel_order")
    return {
        name: sorted(rows(town.core.url, f"SELECT * FROM {name} WHERE payment_id = {payment_id}")) for name in names
    }


async def test_every_way_to_break_the_rules_is_put_right_or_left_alone(town: Town) -> None:
    """What a person has to look into is not touched, and nothing that is planted makes a pass fail."""
    sweeps = Sweeps(town.core)
    await prepare(town.core, len(PLANTS))
    await sweeps.run()
    assert set(sweeps.found()) == {"payment_without_task", "expired_with_excess"}, "made by hand, without tasks"
    ids = {name: plant.apply(town.core.url) for name, plant in PLANTS.items()}
    before = {name: rows_of(town, payment_id) for name, payment_id in ids.items()}
    town.driver.plant_everywhere(bank="bank_a", error_500={"query": True})
    try:
        await sweeps.full()
    finally:
        town.driver.plant_everywhere("bank_a")
    changed = {name for name, payment_id in ids.items() if rows_of(town, payment_id) != before[name]}
    assert changed == REPAIRED.keys()
    assert ids["queried_paid"] in sweeps.pending()
