"""Whatever a bank answers, in whatever state a refund is: the money goes back once, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from paycore.domain.ids import MAX_REFUND_TRIES
from paycore.domain.verdicts import RefundState
from paycore.jobs.gate import SILENT_AFTER
from tests.support.bank import Street, Town, a_town
from tests.support.core import CHANNEL, change, check_money_rules, fresh_database
from tests.support.owed import BANK, Owed, owe, owe_one

ONCE: dict[str, Any] = {"value": True, "times": 1}
DAY_MS = 86_400_000
LONGEST_MS = 1_800_000

PENDING, UNKNOWN, ACCEPTED = RefundState.PENDING, RefundState.UNKNOWN, RefundState.ACCEPTED
REFUNDED, REFUSED = RefundState.REFUNDED, RefundState.REFUSED
RETURNED, ATTENTION = RefundState.RETURNED_BY_CHANNEL, RefundState.NEEDS_ATTENTION
UNFINISHED = (PENDING, UNKNOWN, ACCEPTED, ATTENTION)


@pytest.fixture
async def lone_town(street: Street, tmp_path: Path) -> AsyncIterator[Town]:
    """A core on SQLite: for what the database has no part in."""
    async with a_town(f"sqlite:///{fresh_database(tmp_path / 'paycore.db')}", street, timeout_ms=15_000) as town:
        yield town


async def nothing(_: Owed) -> None:
    """The bank knows nothing of the refund, and nothing goes wrong."""


def planted(**faults: Any) -> Callable[[Owed], Awaitable[None]]:
    """The bank knows nothing of the refund, and this goes wrong."""

    async def arrange(owed: Owed) -> None:
        owed.plant(**faults)

    return arrange


def sent(**faults: Any) -> Callable[[Owed], Awaitable[None]]:
    """The refund is at the bank already, and what it came to was not heard."""

    async def arrange(owed: Owed) -> None:
        owed.plant(**faults)
        await owed.town.core.registry.channel(CHANNEL).refund(owed.refund_order())

    return arrange


async def returned(owed: Owed) -> None:
    """The bank has sent the capture back by itself."""
    owed.town.driver.give_back(owed.order_no, owed.trade_no, BANK)


async def returned_after_a_refusal(owed: Owed) -> None:
    """The bank sent the capture back before it got our refund, and refused that."""
    await returned(owed)
    refused = await owed.town.core.registry.channel(CHANNEL).refund(owed.refund_order())
    assert refused.code == "OVER_CAPTURED"


class Row(NamedTuple):
    """arrange: what the bank knows and does. state: what becomes of the try. then: of a next one."""

    arrange: Callable[[Owed], Awaitable[None]]
    state: RefundState
    then: RefundState | None = None


LATER = {"result": "success", "delay_ms": 50}
TABLE: dict[str, Row] = {
    # What it says to a refund that it is sent.
    "sent_refunded": Row(nothing, REFUNDED),
    "sent_accepted": Row(planted(refund_accepted_only={"value": LATER, "times": 1}), ACCEPTED),
    "sent_refused": Row(planted(refuse={"refund": {"value": "NO", "times": 1}}), REFUSED, PENDING),
    "sent_needs_new_number": Row(planted(refund_closed=ONCE), REFUSED, PENDING),
    "sent_error": Row(planted(error_500={"refund": ONCE}), UNKNOWN),
    "sent_done_without_answer": Row(planted(error_500_after_doing={"refund": ONCE}), UNKNOWN),
    "sent_nonsense": Row(planted(nonsense={"refund": {"value": "unknown_word", "times": 1}}), UNKNOWN),
    # What it says when it is asked, of what reached it before.
    "asked_refunded": Row(sent(), REFUNDED),
    "asked_accepted": Row(sent(refund_accepted_only={"result": "success", "delay_ms": 600_000}), ACCEPTED),
    "asked_refused": Row(sent(refuse={"refund": ONCE}), REFUSED, PENDING),
    "asked_needs_new_number": Row(sent(refund_closed=ONCE), REFUSED, PENDING),
    "asked_returned": Row(returned, RETURNED),
    "asked_returned_after_refusal": Row(returned_after_a_refusal, RETURNED),
    "asked_error": Row(planted(error_500={"query_refund": ONCE}), UNKNOWN),
    "asked_nonsense": Row(planted(nonsense={"query_refund": {"value": "wrong_number", "times": 1}}), UNKNOWN),
}


@pytest.mark.parametrize("answer", TABLE)
async def test_refund_in_any_state_takes_the_answer_and_ends_with_the_money_back_once(
    lone_town: Town, answer: str
) -> None:
    town, row = lone_town, TABLE[answer]
    by_state = dict(zip(UNFINISHED, await owe(town, len(UNFINISHED)), strict=True))
    for state, owed in by_state.items():
        where = f"WHERE payment_id = {owed.payment_id}"
        change(town.core.url, text(f"UPDATE refund_try SET state = {int(state)} {where}"))
        await row.arrange(owed)
    await town.refund()
    for state, owed in by_state.items():
        # What a person was told of stays told until it ends.
        told = state == ATTENTION
        expected = [(1, ATTENTION if told and row.state in UNFINISHED else row.state)]
        if row.then is not None:
            expected.append((2, ATTENTION if told else row.then))
        assert await owed.states() == expected, state.name
    if answer == "asked_accepted":
        # This bank takes its time; that nothing is sent meanwhile is what matters.
        town.clock.advance(LONGEST_MS)
        await town.refund()
        assert all(list(owed.at_bank().values()) == ["ACCEPTED"] for owed in by_state.values())
        return
    await asyncio.sleep(0.1)
    for _ in range(2):
        town.clock.advance(LONGEST_MS)
        await town.refund()
    for state, owed in by_state.items():
        await assert_ended(owed, RETURNED if row.state == RETURNED else REFUNDED, context=state.name)
    check_money_rules(town.core.snapshot())


async def assert_ended(owed: Owed, state: RefundState, *, context: str = "") -> None:
    """The user has the money once, by the way that is on record, and no number is left open."""
    by_whom = {REFUNDED: "REFUNDED", RETURNED: "RETURNED"}[state]
    moved = [result for result in owed.at_bank().values() if result in {"REFUNDED", "RETURNED"}]
    assert (moved, owed.kept_minor()) == ([by_whom], 0), context
    states = await owed.states()
    assert [one for _, one in states] == [REFUSED] * (len(states) - 1) + [state], context
    assert [result.result for result in await owed.results()] == [one for _, one in states], context


async def test_refund_returned_by_the_bank_is_never_sent(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)
    await returned(owed)
    asked = town.driver.asked(BANK)
    await town.refund(passes=2)
    await assert_ended(owed, RETURNED)
    assert town.driver.asked(BANK)["refund"] == asked["refund"]
    assert town.driver.asked(BANK)["query_refund"] == asked["query_refund"] + 1


async def test_refund_returned_by_the_bank_between_question_and_sending_is_not_doubled(
    street: Street, db_url: str
) -> None:
    async with a_town(db_url, street, timeout_ms=15_000) as town:
        owed = await owe_one(town)
        owed.plant(answer_delay_ms={"query_refund": {"value": 800, "times": 1}})
        asked = town.driver.asked(BANK)["query_refund"]
        under_way = asyncio.create_task(town.core.refunder.run_once())
        async with asyncio.timeout(10):
            while town.driver.asked(BANK)["query_refund"] == asked:
                await asyncio.sleep(0.01)
        # The bank has looked by now, or is just about to: its answer leaves in most of a second.
        await asyncio.sleep(0.2)
        await returned(owed)
        await under_way
        assert await owed.states() == [(1, REFUSED), (2, PENDING)]
        town.clock.advance(1_000)
        await town.refund()
        await assert_ended(owed, RETURNED)
        assert len(owed.at_bank()) == 2


async def test_refund_that_the_bank_answers_after_a_minute_keeps_its_number(town: Town) -> None:
    owed = await owe_one(town)
    owed.plant(answer_delay_ms={"refund": {"value": 60_000, "times": 1}})
    await town.refund()
    assert await owed.states() == [(1, UNKNOWN)]
    await town.refund()
    await assert_ended(owed, REFUNDED)


async def test_refund_that_is_refused_several_times_takes_as_many_numbers_and_moves_money_once(
    patient_town: Town,
) -> None:
    town = patient_town
    owed = await owe_one(town)
    owed.plant(refuse={"refund": {"value": "NOT_NOW", "times": 4}})
    await town.refund(passes=5)
    await assert_ended(owed, REFUNDED)
    assert list(owed.at_bank()) == [owed.sent_no(seq) for seq in range(1, 6)]


# A person is told


async def test_refund_that_stays_unfinished_for_a_day_needs_attention_and_is_told_once(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)
    owed.plant(error_500={"refund": True})
    await town.refund()
    town.clock.advance(DAY_MS - 10_000)
    with capture_logs() as before:
        await town.refund()
    assert await owed.states() == [(1, UNKNOWN)]
    town.clock.advance(10_000)
    with capture_logs() as at_age:
        await town.refund()
    assert await owed.states() == [(1, ATTENTION)]
    with capture_logs() as after:
        for _ in range(3):
            town.clock.advance(LONGEST_MS)
            await town.refund()
    told = [[line for line in lines if line["log_level"] == "error"] for lines in (before, at_age, after)]
    assert [len(lines) for lines in told] == [0, 1, 0]
    (line,) = told[1]
    assert line["event"] == "refund_needs_attention"
    assert line["channel_refund_no"] == owed.sent_no()
    assert line["why"]
    assert town.core.count("paycore_refunds_total", reason="DUPLICATE", state="NEEDS_ATTENTION") == 1
    assert town.core.store.backlog().refunds_need_attention == 1
    (row,) = await owed.tries()
    assert row.next_at_ms - row.state_at_ms == LONGEST_MS


async def test_refund_that_needs_attention_still_finishes_by_itself(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)
    owed.plant(error_500={"refund": True})
    town.clock.advance(DAY_MS)
    await town.refund()
    assert await owed.states() == [(1, ATTENTION)]
    owed.plant()
    await town.refund()
    assert await owed.states() == [(1, ATTENTION)], "it rests"
    town.clock.advance(LONGEST_MS)
    await town.refund()
    await assert_ended(owed, REFUNDED)
    assert town.core.store.backlog() == (0, None, 0, None)


async def test_refund_refused_day_after_day_is_told_once_and_goes_on(patient_town: Town) -> None:
    town = patient_town
    owed = await owe_one(town)
    owed.plant(refuse={"refund": {"value": "NOT_NOW", "times": 3}})
    town.clock.advance(DAY_MS)
    with capture_logs() as lines:
        for _ in range(4):
            await town.refund()
            town.clock.advance(LONGEST_MS)
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["refund_needs_attention"]
    assert town.core.count("paycore_refunds_total", reason="DUPLICATE", state="NEEDS_ATTENTION") == 1
    await assert_ended(owed, REFUNDED)


async def test_refund_refused_under_its_last_number_needs_attention_and_is_asked_about_for_ever(
    patient_town: Town,
) -> None:
    town = patient_town
    owed = await owe_one(town)
    last = f"seq = {MAX_REFUND_TRIES}, channel_refund_no = '{owed.sent_no(MAX_REFUND_TRIES)}'"
    change(town.core.url, text(f"UPDATE refund_try SET {last} WHERE payment_id = {owed.payment_id}"))
    owed.plant(refuse={"refund": True})
    with capture_logs() as lines:
        for _ in range(3):
            await town.refund()
            town.clock.advance(LONGEST_MS)
    assert await owed.states() == [(MAX_REFUND_TRIES, ATTENTION)]
    assert await owed.results() == []
    (row,) = await owed.tries()
    assert f"all {MAX_REFUND_TRIES} numbers" in row.last_error
    assert row.asks == 3
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["refund_needs_attention"]
    assert town.core.store.backlog().oldest_refund_at_ms is not None
    # A person had the bank return the money in its own way.
    await returned(owed)
    await town.refund()
    assert await owed.states() == [(MAX_REFUND_TRIES, RETURNED)]
    assert owed.kept_minor() == 0


async def test_refund_that_nobody_can_ask_about_needs_attention_too(street: Street, town: Town) -> None:
    """Its account is configured nowhere for a day; the pass that finds it old has nothing that is due."""
    owed = await owe_one(town)
    async with a_town(town.core.url, street, accounts=("bank_a",)) as other:
        await other.refund()
        other.clock.advance(DAY_MS)
        change(town.core.url, text(f"UPDATE refund_try SET next_at_ms = {other.clock.now_ms() + LONGEST_MS}"))
        with capture_logs() as lines:
            await other.refund()
    assert await owed.states() == [(1, ATTENTION)]
    (line,) = [line for line in lines if line["log_level"] == "error"]
    assert "not asked" in line["why"]


# Many at once


async def test_many_refunders_at_once_ask_and_send_each_refund_once(street: Street, patient_town: Town) -> None:
    town = patient_town
    every = await owe(town, 24)
    asked = town.driver.asked(BANK)
    async with a_town(town.core.url, street, timeout_ms=15_000) as other:
        refunders = [town.core.refunder, town.core.a_refunder(), other.core.refunder, other.core.a_refunder()]
        passes = await asyncio.gather(*(one.run_once() for one in refunders))
        assert sum(result.done for result in passes) == 24
        town.clock.advance(1_000)
        assert await town.core.refunder.run_once() == (0, 0, 0, False)
    now_asked = town.driver.asked(BANK)
    assert {what: now_asked[what] - asked[what] for what in ("query_refund", "refund")} == {
        "query_refund": 24,
        "refund": 24,
    }
    for owed in every:
        await assert_ended(owed, REFUNDED)
    check_money_rules(town.core.snapshot())


async def test_pass_tells_how_far_it_is_and_what_is_put_off(lone_town: Town) -> None:
    town = lone_town
    first, *_ = await owe(town, 6)
    first.plant(error_500={"refund": True})
    told: list[tuple[int, int]] = []
    town.clock.advance(5_000)
    result = await town.core.refunder.run_once(lambda looked_at, known: told.append((looked_at, known)))
    assert (result.done, result.put_off, result.more) == (5, 1, False)
    assert told[-1] == (6, 6)
    assert told == sorted(told)
    town.clock.advance(7_000)
    assert (await town.core.a_refunder(retry_ms=60_000).run_once())[:2] == (0, 1)


async def test_refunds_that_failed_together_do_not_come_back_together(lone_town: Town) -> None:
    town = lone_town
    every = await owe(town, 12)
    # One more error would make the account rest, and what is asked about before it does is left to chance.
    for owed in every[: SILENT_AFTER - 1]:
        owed.plant(error_500={"refund": True})
    for owed in every[SILENT_AFTER - 1 :]:
        owed.plant(refuse={"refund": True})
    drawn = itertools.count(0, 1_700)
    result = await town.core.a_refunder(draw=lambda n: next(drawn) % n, retry_ms=100_000).run_once()
    assert result[:2] == (0, 12)
    last_tries = [(await owed.tries())[-1] for owed in every]
    assert [row.seq for row in last_tries] == [1] * (SILENT_AFTER - 1) + [2] * (12 - SILENT_AFTER + 1)
    waits = [row.next_at_ms - row.state_at_ms for row in last_tries]
    assert all(50_000 <= wait_ms <= 100_000 for wait_ms in waits)
    assert len(set(waits)) == 12


async def test_refund_that_breaks_its_adapter_keeps_no_other_from_its_turn(
    lone_town: Town, monkeypatch: pytest.MonkeyPatch
) -> None:
    town = lone_town
    broken, *others = await owe(town, 4)
    channel = town.core.registry.channel(CHANNEL)
    ask = channel.query_refund

    async def break_on_one(order: Any) -> Any:
        if order.channel_refund_no == broken.sent_no():
            raise TypeError("a defect")
        return await ask(order)

    monkeypatch.setattr(channel, "query_refund", break_on_one)
    await town.refund()
    for owed in others:
        await assert_ended(owed, REFUNDED)
    (row,) = await broken.tries()
    assert (row.state, row.lease_until_ms) == (UNKNOWN, 0)
    assert "a defect" in row.last_error
    monkeypatch.undo()
    await town.refund()
    await assert_ended(broken, REFUNDED)
