"""Quarantine where several work on it at once, where one dies in the middle, and where it is flooded."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from paycore.domain.ids import ChannelOrderNo
from paycore.domain.notification import Notification, quarantine_id
from paycore.domain.verdicts import NotifyOutcome, PaymentState
from paycore.jobs.examiner import BATCH
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import QuarantineRow, Stamp
from paycore.usecases.writer import UnindexedUnit
from tests.support.bank import Street, Town, a_town
from tests.support.core import Core, check_money_rules, read_all
from tests.support.databases import KINDS, make_database
from tests.support.quarantine import (
    a_judge,
    an_examiner,
    assert_only_back,
    evidence_of,
    examine,
    the_row,
    verdicts_of,
)
from tests.support.racers import Racer, payment_rows, two_racers

WRONG_MINOR = 999
SEVEN_HOURS_MS = 25_200_000

# Before the transaction, inside it with its first outcomes written, and inside it with everything written.
PLACES = ("writer.taken", "judge.outcomes_inserted", "store.before_commit")

loop_of_the_module = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=KINDS)
def shared_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_database(request.param, tmp_path_factory.mktemp("races"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def racers(shared_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Racer, Racer]]:
    async with two_racers(shared_url, tmp_path_factory.mktemp("racers")) as racers:
        yield racers


async def meet(held: Racer, point: str, first: tuple[str, dict[str, Any]], free: Racer, second: Any) -> tuple[Any, Any]:
    """Hold one process at a place while the other does its own, or waits for it."""
    held.shut(point)
    try:
        held_answer = held.ask(first[0], **first[1])
        await held.reached(point)
        free_answer = free.ask(second[0], **second[1])
        await asyncio.wait([free_answer], timeout=0.25)
    finally:
        held.open(point)
    answers = await held_answer, await free_answer
    return answers[0], await free.ask(second[0], **second[1]) if answers[1] == "STORE_BUSY" else answers[1]


def open_evidence(url: str, payment_id: int) -> str:
    (row,) = payment_rows(url, payment_id)["quarantine"]
    assert row.is_open
    return str(row.quarantine_id)


def check_payment(url: str, payment_id: int) -> dict[str, list[Any]]:
    rows = payment_rows(url, payment_id)
    check_money_rules({name: rows.get(name, []) for name in ("payment_outcome", "excess_payment", "refund")})
    return rows


@loop_of_the_module
@pytest.mark.parametrize("confirm_is_held", [True, False], ids=["confirm_held", "notify_held"])
@pytest.mark.parametrize("point", PLACES)
async def test_confirmation_that_meets_the_right_word_about_its_capture_never_leaves_it_kept_and_excess(
    shared_url: str, racers: tuple[Racer, Racer], point: str, confirm_is_held: bool
) -> None:
    held, free = racers
    payment_id = await held.ask("make", attempts=["bank_a"], ended=[])
    wrong = await held.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1", amount_minor=WRONG_MINOR)
    assert wrong == ["MISMATCH", False]
    # Both think from memory that nothing is on record.
    await asyncio.gather(held.ask("warm", payment_id=payment_id), free.ask("warm", payment_id=payment_id))
    confirm = ("confirm", {"quarantine_id": open_evidence(shared_url, payment_id)})
    notify = ("notify", {"payment_id": payment_id, "attempt": 1, "trade_no": "T1"})
    first, second = (confirm, notify) if confirm_is_held else (notify, confirm)
    answers = await meet(held, point, first, free, second)
    confirmed, notified = answers if confirm_is_held else answers[::-1]
    rows = check_payment(shared_url, payment_id)
    if notified == ["ACCEPTED", False]:
        assert confirmed == "CAPTURE_KEPT"
        assert "excess_payment" not in rows
    else:
        assert (notified, confirmed) == (["MISMATCH", False], "confirmed")
        assert [(row.channel_trade_no, row.amount_minor) for row in rows["excess_payment"]] == [("T1", WRONG_MINOR)]
        assert "payment_outcome" not in rows


@loop_of_the_module
@pytest.mark.parametrize("point", PLACES)
async def test_two_confirmations_of_one_capture_make_one_excess_and_one_refund(
    shared_url: str, racers: tuple[Racer, Racer], point: str
) -> None:
    held, free = racers
    payment_id = await held.ask("make", attempts=["bank_a"], ended=[])
    for trade_no in ("T1", "T2"):
        await held.ask("notify", payment_id=payment_id, attempt=1, trade_no=trade_no)
    confirm = ("confirm", {"quarantine_id": open_evidence(shared_url, payment_id)})
    answers = await meet(held, point, confirm, free, confirm)
    # Whoever came second finds the row moved, or the capture on record.
    assert set(answers) <= {"confirmed", "EVIDENCE_MOVED"}
    assert "confirmed" in answers
    rows = check_payment(shared_url, payment_id)
    assert len(rows["excess_payment"]) == len(rows["refund"]) == len(rows["refund_try"]) == 1


@loop_of_the_module
@pytest.mark.parametrize("confirm_is_held", [True, False], ids=["confirm_held", "notify_held"])
@pytest.mark.parametrize("point", PLACES)
async def test_word_that_meets_its_own_confirmation_is_a_replay_or_keeps_the_row_open(
    shared_url: str, racers: tuple[Racer, Racer], point: str, confirm_is_held: bool
) -> None:
    held, free = racers
    payment_id = await held.ask("make", attempts=["bank_a"], ended=[])
    for trade_no in ("T1", "T2"):
        await held.ask("notify", payment_id=payment_id, attempt=1, trade_no=trade_no)
    confirm = ("confirm", {"quarantine_id": open_evidence(shared_url, payment_id)})
    notify = ("notify", {"payment_id": payment_id, "attempt": 1, "trade_no": "T2"})
    first, second = (confirm, notify) if confirm_is_held else (notify, confirm)
    answers = await meet(held, point, first, free, second)
    confirmed, notified = answers if confirm_is_held else answers[::-1]
    rows = check_payment(shared_url, payment_id)
    assert notified[0] == "SECOND_CAPTURE"
    (row,) = rows["quarantine"]
    if confirmed == "EVIDENCE_MOVED":
        assert (row.is_open, row.arrivals, rows.get("excess_payment")) == (1, 2, None)
    else:
        assert confirmed == "confirmed"
        assert (row.is_open, len(rows["excess_payment"]), len(rows["refund"])) == (0, 1, 1)


async def paid_twice_on_one_page(town: Town, *, heard_ms_ago: int = 0) -> tuple[int, str]:
    """A payment that one bank order was paid for twice; the second capture lies in quarantine."""
    payment_id = (await town.core.pay(town.order())).payment.payment_id
    trade_nos = town.user_pays(payment_id, pay_twice_on_page=True)
    for trade_no in trade_nos:
        heard_ms = town.clock.now_ms() - heard_ms_ago
        await town.core.notify(town.core.word(payment_id, 1, trade_no, received_at_ms=heard_ms))
    return payment_id, trade_nos[1]


async def test_examiners_that_ask_at_once_send_the_money_back_once(street: Street, town: Town) -> None:
    payment_id, second = await paid_twice_on_one_page(town)
    asked = {ChannelOrderNo(payment_id, 1): [the_row(town.core, NotifyOutcome.SECOND_CAPTURE).quarantine_id]}
    async with a_town(town.core.url, street) as other:
        # Without the lease that keeps them apart as a rule.
        judges = [a_judge(core) for core in (town.core, other.core) for _ in range(4)]
        await asyncio.gather(*(judge.ask_all(asked) for judge in judges))
        passes = await asyncio.gather(*(an_examiner(core).run_once() for core in (town.core, other.core)))
    assert all(one.done == 0 for one in passes)
    assert verdicts_of(the_row(town.core, NotifyOutcome.SECOND_CAPTURE)) == ["confirmed"]
    await assert_only_back(town, payment_id, second)


@pytest.mark.parametrize("point", ["examiner.judged", "confirm.written", "examiner.looked"])
async def test_examiner_killed_on_the_way_is_followed_by_one_that_ends_the_work(
    street: Street, town: Town, tmp_path: Path, point: str
) -> None:
    # Beyond the last age of the ladder: only what this look leaves undone is come back to before a day is over.
    payment_id, second = await paid_twice_on_one_page(town, heard_ms_ago=SEVEN_HOURS_MS)
    core = town.core
    unknown_id = core.ids.draw()
    word = core.word(unknown_id, received_at_ms=core.clock.now_ms() - SEVEN_HOURS_MS)
    assert (await core.notify(word)).outcome == NotifyOutcome.UNKNOWN
    await make_with_id(core, unknown_id)
    doomed = await Racer(core.url, tmp_path / "racer", bank_url=street.bank.url, **{point: "crash"}).start()
    try:
        assert await doomed.ask("examine") == "DEAD"
        assert await doomed.wait_dead() == -9
    finally:
        await doomed.stop()
    await examine(core, after_ms=60_001)
    assert evidence_of(core, only_open=True) == []
    assert verdicts_of(the_row(core, NotifyOutcome.UNKNOWN)) == ["judged"]
    assert verdicts_of(the_row(core, NotifyOutcome.SECOND_CAPTURE)) == ["confirmed"]
    assert (await town.file(unknown_id)).record.state == PaymentState.PAID
    await assert_only_back(town, payment_id, second)


async def make_with_id(core: Core, payment_id: int) -> None:
    drawn = core.ids.draw
    core.ids.draw = lambda: payment_id  # type: ignore[method-assign]  # the id is known beforehand here
    assert await core.make_payment() == payment_id
    core.ids.draw = drawn  # type: ignore[method-assign]  # as it was


class _Flood(UnindexedUnit):
    """Evidence of many orders, all of one moment, as one large batch brings it."""

    def __init__(self, words: list[Notification], first_seen_at_ms: int) -> None:
        self._words, self._first_seen_at_ms = words, first_seen_at_ms

    def apply(self, transaction: WriteTransaction) -> None:
        transaction.put_quarantine([self._row(word, transaction.stamp) for word in self._words])

    def _row(self, word: Notification, stamp: Stamp) -> QuarantineRow:
        return QuarantineRow(
            quarantine_id=quarantine_id(word, NotifyOutcome.UNKNOWN),
            reason=NotifyOutcome.UNKNOWN,
            payment_id=int(word.channel_order_no[:-2]),
            attempt=1,
            result=word.result,
            channel=word.channel,
            account=word.account,
            channel_order_no=word.channel_order_no,
            channel_trade_no=word.channel_trade_no,
            amount_minor=word.amount_minor,
            currency=word.currency,
            paid_at_ms=word.paid_at_ms,
            source=word.source,
            raw=b"x" * 500,
            headers="{}",
            first_seen_at_ms=self._first_seen_at_ms,
            last_seen_at_ms=self._first_seen_at_ms,
            arrivals=1,
            is_open=1,
            resolutions="[]",
            recorded_at_ms=stamp.recorded_at_ms,
            writer_no=stamp.writer_no,
            group_no=stamp.group_no,
        )


async def test_flood_is_looked_through_in_bounded_passes_and_the_order_behind_it_is_found(town: Town) -> None:
    core = town.core
    # Three ages of the ladder at once: each row is looked at once all the same.
    first_ms = core.clock.now_ms() - 60_000
    numbers = itertools.count(core.ids.draw() + 1_000_000_000)
    words = [core.word(next(numbers), 1, f"F{number}") for number in range(10_000)]
    await core.writer.run(_Flood(words, first_ms))
    payment_id = core.ids.draw()
    word = core.word(payment_id, received_at_ms=first_ms + 1)
    assert (await core.notify(word)).outcome == NotifyOutcome.UNKNOWN
    await make_with_id(core, payment_id)
    looked: list[int] = []
    longest_ns = passes = done = 0
    while True:
        known: list[int] = []
        started_ns = time.perf_counter_ns()
        result = await an_examiner(core).run_once(lambda _, total, known=known: known.append(total))  # type: ignore[misc]
        longest_ns = max(longest_ns, time.perf_counter_ns() - started_ns)
        passes, done = passes + 1, done + result.done
        looked += known[:1]
        if not result.more:
            break
    assert (done, sum(looked), max(looked)) == (1, 10_001, BATCH)
    assert passes <= 12
    # A machine that does nothing else takes well under a tenth of this.
    assert longest_ns < 5_000_000_000
    assert (await town.file(payment_id)).record.state == PaymentState.PAID
    assert await examine(core) == (0, 0, 0, False)
    check_money_rules(read_all(core.url))
