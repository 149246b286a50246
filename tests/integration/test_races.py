"""Two processes on one database: what belongs together meets in every order that failpoints can force.

Each case holds one process at one named place until the other one has answered, or has met a lock.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import excess_refund_no
from paycore.domain.verdicts import PaymentState
from tests.support.core import check_money_rules, read_all
from tests.support.databases import KINDS, make_database
from tests.support.racers import LOCKED_POINTS, POINTS, Racer, payment_rows, two_racers

pytestmark = pytest.mark.asyncio(loop_scope="module")

_orders = itertools.count(1)

AFTER_EXPIRY_MS = 4_000_000_000_000
"""In the year 2096."""


@pytest.fixture(scope="module", params=KINDS)
def db_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_database(request.param, tmp_path_factory.mktemp("races"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def racers(db_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Racer, Racer]]:
    async with two_racers(db_url, tmp_path_factory.mktemp("racers")) as racers:
        yield racers


async def meet(
    held: Racer, point: str, held_asks: tuple[str, dict[str, Any]], free: Racer, free_asks: tuple[str, dict[str, Any]]
) -> tuple[Any, Any]:
    """Hold one process at a place with what it does while the other one does its own; return both answers.

    A held process that has a lock which the other one needs lets it be met; elsewhere the other one answers first. One
    that waited too long for the lock is UNAVAILABLE, and its caller sends again.
    """
    busy = await free.ask("busy")
    held.shut(point)
    try:
        first = held.ask(held_asks[0], **held_asks[1])
        await held.reached(point)
        second = free.ask(free_asks[0], **free_asks[1])
        await met_or_answered(free, busy, second, must_meet=point in LOCKED_POINTS and not held.on_postgresql)
    finally:
        held.open(point)
    answers = await first, await second
    return answers[0], await free.ask(free_asks[0], **free_asks[1]) if answers[1] == "STORE_BUSY" else answers[1]


async def met_or_answered(free: Racer, busy: int, second: asyncio.Future[Any], *, must_meet: bool) -> None:
    """Wait until the free process has met a lock; where it need not, until it has answered, if that is sooner."""
    meeting = asyncio.ensure_future(free.met_the_lock(busy))
    await asyncio.wait([meeting] if must_meet else [meeting, second], return_when=asyncio.FIRST_COMPLETED, timeout=15)
    assert meeting.done() or (second.done() and not must_meet)
    meeting.cancel()


def notify(payment_id: int, attempt: int, trade_no: str) -> tuple[str, dict[str, Any]]:
    return "notify", {"payment_id": payment_id, "attempt": attempt, "trade_no": trade_no}


def assert_one_kept_one_refunded(db_url: str, payment_id: int, answers: dict[int, Any]) -> None:
    """answers: attempt -> (outcome, replayed); attempt n's capture has the trade number Tn."""
    assert sorted(map(tuple, answers.values())) == [("ACCEPTED", False), ("DUPLICATE", False)]
    (loser,) = [attempt for attempt, answer in answers.items() if answer[0] == "DUPLICATE"]
    rows = payment_rows(db_url, payment_id)
    (outcome,), (excess,), (refund,) = rows["payment_outcome"], rows["excess_payment"], rows["refund"]
    assert (outcome.state, outcome.attempt) == (PaymentState.PAID, 3 - loser)
    assert (excess.attempt, excess.channel_trade_no) == (loser, f"T{loser}")
    assert refund.refund_no == excess_refund_no(loser, f"T{loser}")
    assert len(rows["refund_try"]) == 1
    assert "quarantine" not in rows


@pytest.mark.parametrize("other_is_warm", [True, False], ids=["stale", "cold"])
@pytest.mark.parametrize("held_is_maker", [True, False], ids=["maker_held", "other_held"])
@pytest.mark.parametrize("point", POINTS)
async def test_two_successes_meeting_in_two_processes_keep_one_and_refund_the_other(
    racers: tuple[Racer, Racer], db_url: str, point: str, held_is_maker: bool, other_is_warm: bool
) -> None:
    maker, other = racers
    payment_id = await maker.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    if other_is_warm:
        assert await other.ask("warm", payment_id=payment_id)
    held, free = (maker, other) if held_is_maker else (other, maker)
    first, second = await meet(held, point, notify(payment_id, 1, "T1"), free, notify(payment_id, 2, "T2"))
    assert_one_kept_one_refunded(db_url, payment_id, {1: first, 2: second})
    for racer in racers:
        for attempt, (outcome, _) in ((1, first), (2, second)):
            again = await racer.ask("notify", payment_id=payment_id, attempt=attempt, trade_no=f"T{attempt}")
            assert again == [outcome, True]


@pytest.mark.parametrize("other_is_warm", [True, False], ids=["stale", "cold"])
@pytest.mark.parametrize("held_is_maker", [True, False], ids=["maker_held", "other_held"])
@pytest.mark.parametrize("point", POINTS)
async def test_one_success_told_to_two_processes_is_accepted_once_and_replayed_once(
    racers: tuple[Racer, Racer], db_url: str, point: str, held_is_maker: bool, other_is_warm: bool
) -> None:
    maker, other = racers
    payment_id = await maker.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    if other_is_warm:
        await other.ask("warm", payment_id=payment_id)
    held, free = (maker, other) if held_is_maker else (other, maker)
    told = notify(payment_id, 1, "T1")
    answers = await meet(held, point, told, free, told)
    assert sorted(map(tuple, answers)) == [("ACCEPTED", False), ("ACCEPTED", True)]
    rows = payment_rows(db_url, payment_id)
    assert rows.keys() == {"merchant_order", "payment", "channel_order", "payment_outcome"}


@pytest.mark.parametrize("point", LOCKED_POINTS)
async def test_success_that_outwaits_the_lock_is_unavailable_and_right_when_sent_again(
    racers: tuple[Racer, Racer], db_url: str, point: str
) -> None:
    held, free = racers
    payment_id = await held.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    await free.ask("warm", payment_id=payment_id)
    held.shut(point)
    first = held.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1")
    await held.reached(point)
    # A transaction of PostgreSQL's that has written nothing stands in nobody's way.
    is_free = held.on_postgresql and point == "store.begun"
    told = await free.ask("notify", payment_id=payment_id, attempt=2, trade_no="T2")
    assert told == (["ACCEPTED", False] if is_free else "STORE_BUSY")
    held.open(point)
    answers = {1: await first, 2: told}
    if not is_free:
        answers[2] = await free.ask("notify", payment_id=payment_id, attempt=2, trade_no="T2")
        assert answers[1] == ["ACCEPTED", False]
    assert_one_kept_one_refunded(db_url, payment_id, answers)


@pytest.mark.parametrize(
    ("trade_no", "answer"), [("T1", ["LATE", True]), ("T2", ["SECOND_CAPTURE", False])], ids=["replay", "second_trade"]
)
async def test_word_about_a_capture_that_another_process_judged_late_is_compared_with_it(
    racers: tuple[Racer, Racer], db_url: str, trade_no: str, answer: list[Any]
) -> None:
    """The stale index has no bit for the attempt, and this word, unlike the first, does not say that it is late."""
    judge, stale = racers
    payment_id = await judge.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    await stale.ask("warm", payment_id=payment_id)
    late = {"paid_at_ms": AFTER_EXPIRY_MS, "received_at_ms": AFTER_EXPIRY_MS}
    assert await judge.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1", **late) == ["LATE", False]
    word = {"payment_id": payment_id, "attempt": 1, "trade_no": trade_no, "paid_at_ms": ABSENT_MS}
    told = await stale.ask("notify", **word)
    rows = payment_rows(db_url, payment_id)
    kept = {(row.attempt, row.channel_trade_no) for row in rows.get("payment_outcome", [])}
    assert not kept & {(row.attempt, row.channel_trade_no) for row in rows["excess_payment"]}
    assert told == answer


@pytest.mark.parametrize("held_is_late", [True, False], ids=["late_held", "in_time_held"])
@pytest.mark.parametrize("point", POINTS)
async def test_capture_told_in_time_to_one_process_and_late_to_another_is_never_kept_and_excess_at_once(
    racers: tuple[Racer, Racer], db_url: str, point: str, held_is_late: bool
) -> None:
    """The late one writes an excess that waits for an outcome while the other one writes just that outcome."""
    maker, other = racers
    payment_id = await maker.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    await other.ask("warm", payment_id=payment_id)
    verb, word = notify(payment_id, 1, "T1")
    late = verb, {**word, "paid_at_ms": AFTER_EXPIRY_MS, "received_at_ms": AFTER_EXPIRY_MS}
    in_time = verb, {**word, "paid_at_ms": ABSENT_MS}
    first, second = (late, in_time) if held_is_late else (in_time, late)
    answers = await meet(maker, point, first, other, second)
    assert sorted(replayed for _, replayed in answers) == [False, True]
    assert len({outcome for outcome, _ in answers}) == 1
    rows = payment_rows(db_url, payment_id)
    assert len(rows.get("payment_outcome", [])) + len(rows.get("excess_payment", [])) == 1


@pytest.mark.parametrize("held_closes", [True, False], ids=["close_held", "notify_held"])
@pytest.mark.parametrize("point", POINTS)
async def test_success_meeting_a_close_ends_paid_or_closed_and_refunded(
    racers: tuple[Racer, Racer], db_url: str, point: str, held_closes: bool
) -> None:
    maker, other = racers
    payment_id = await maker.ask("make", attempts=["bank_a"], ended=[1])
    await other.ask("warm", payment_id=payment_id)
    success, closing = notify(payment_id, 1, "T1"), ("close", {"payment_id": payment_id})
    if held_closes:
        closed, told = await meet(maker, point, closing, other, success)
    else:
        told, closed = await meet(maker, point, success, other, closing)
    rows = payment_rows(db_url, payment_id)
    (outcome,) = rows["payment_outcome"]
    assert PaymentState[closed] == outcome.state
    if closed == "PAID":
        assert told == ["ACCEPTED", False]
        assert not rows.keys() & {"excess_payment", "refund"}
    else:
        assert told == ["LATE", False]
        (refund,) = rows["refund"]
        assert (refund.attempt, refund.channel_trade_no) == (1, "T1")


@pytest.mark.parametrize("held_pays", [True, False], ids=["pay_held", "notify_held"])
@pytest.mark.parametrize("point", POINTS)
async def test_success_meeting_a_second_pay_opens_nothing_on_a_paid_payment(
    racers: tuple[Racer, Racer], db_url: str, point: str, held_pays: bool
) -> None:
    maker, other = racers
    number = f"pay-{next(_orders)}"
    step, payment_id, attempt = await maker.ask("open", order_no=number, account="bank_a")
    assert (step, attempt) == ("CREATE", 1)
    success, paying = notify(payment_id, 1, "T1"), ("open", {"order_no": number, "account": "bank_b"})
    if held_pays:
        (step, _, attempt), told = await meet(maker, point, paying, other, success)
    else:
        told, (step, _, attempt) = await meet(maker, point, success, other, paying)
    assert told == ["ACCEPTED", False]
    rows = payment_rows(db_url, payment_id)
    if step == "PAID":
        assert len(rows["channel_order"]) == 1
    else:
        assert (step, attempt, len(rows["channel_order"])) == ("CREATE", 2, 2)
        # The attempt that was written first may be paid all the same, and its money goes back.
        assert await maker.ask("notify", payment_id=payment_id, attempt=2, trade_no="T2") == ["DUPLICATE", False]
        assert await other.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == ["ACCEPTED", True]


@pytest.mark.parametrize("point", POINTS)
async def test_two_first_pays_of_one_order_make_one_payment_and_one_attempt(
    racers: tuple[Racer, Racer], db_url: str, point: str
) -> None:
    held, free = racers
    paying = ("open", {"order_no": f"first-{next(_orders)}", "account": "bank_a"})
    answers = await meet(held, point, paying, free, paying)
    assert len({payment_id for _, payment_id, _ in answers}) == 1
    assert sorted(step for step, _, _ in answers) == ["CREATE", "WAIT"]
    rows = payment_rows(db_url, answers[0][1])
    assert (len(rows["payment"]), len(rows["merchant_order"]), len(rows["channel_order"])) == (1, 1, 1)


@pytest.mark.parametrize("point", POINTS)
async def test_two_pays_at_two_banks_make_attempts_of_their_own(
    racers: tuple[Racer, Racer], db_url: str, point: str
) -> None:
    held, free = racers
    number = f"banks-{next(_orders)}"
    first = ("open", {"order_no": number, "account": "bank_a"})
    second = ("open", {"order_no": number, "account": "bank_b"})
    answers = await meet(held, point, first, free, second)
    assert sorted((step, attempt) for step, _, attempt in answers) == [("CREATE", 1), ("CREATE", 2)]
    (older, younger) = payment_rows(db_url, answers[0][1])["channel_order"]
    assert older.superseded_at_ms is not None
    assert younger.superseded_at_ms is None


async def an_order_with_an_ended_attempt(racer: Racer) -> tuple[str, int]:
    """A payment whose first attempt has failed for good; return its order number and its id."""
    number = f"ended-{next(_orders)}"
    step, payment_id, _ = await racer.ask("open", order_no=number, account="bank_a")
    assert step == "CREATE"
    assert await racer.ask("fail", payment_id=payment_id, attempt=1) == ["RECORDED", False]
    return number, payment_id


@pytest.mark.parametrize("held_pays", [True, False], ids=["pay_held", "close_held"])
@pytest.mark.parametrize("point", POINTS)
async def test_new_attempt_meeting_a_close_never_stands_open_on_a_closed_payment(
    racers: tuple[Racer, Racer], db_url: str, point: str, held_pays: bool
) -> None:
    maker, other = racers
    number, payment_id = await an_order_with_an_ended_attempt(maker)
    paying, closing = ("open", {"order_no": number, "account": "bank_b"}), ("close", {"payment_id": payment_id})
    if held_pays:
        paid, closed = await meet(maker, point, paying, other, closing)
    else:
        closed, paid = await meet(maker, point, closing, other, paying)
    rows = payment_rows(db_url, payment_id)
    if closed == "CLOSED":
        assert paid == "PAYMENT_CLOSED"
        assert len(rows["channel_order"]) == 1
    else:
        assert (closed, paid[0], paid[2]) == ("ATTEMPT_STATE_UNKNOWN", "CREATE", 2)
        assert "payment_outcome" not in rows


@pytest.mark.parametrize("point", POINTS)
async def test_two_pays_of_one_payment_at_two_more_banks_number_their_attempts_apart(
    racers: tuple[Racer, Racer], db_url: str, point: str
) -> None:
    held, free = racers
    number, payment_id = await an_order_with_an_ended_attempt(held)
    first, second = (("open", {"order_no": number, "account": account}) for account in ("bank_b", "bank_c"))
    answers = await meet(held, point, first, free, second)
    assert sorted((step, attempt) for step, _, attempt in answers) == [("CREATE", 2), ("CREATE", 3)]
    assert [row.attempt for row in payment_rows(db_url, payment_id)["channel_order"]] == [1, 2, 3]


async def test_many_words_to_two_processes_at_once_keep_one_capture_a_payment(
    racers: tuple[Racer, Racer], db_url: str
) -> None:
    """No failpoint: whatever the machine makes of it. Each word is told to both processes, in waves."""
    ids = [await racers[n % 2].ask("make", attempts=["bank_a", "bank_b", "bank_c"], ended=[]) for n in range(20)]
    asked = [
        racer.ask("notify", payment_id=payment_id, attempt=attempt, trade_no=f"T{attempt}")
        for payment_id in ids
        for attempt in (1, 2, 3)
        for racer in racers
    ]
    answers = await asyncio.gather(*asked)
    by_payment = [answers[start : start + 6] for start in range(0, len(answers), 6)]
    for told in by_payment:
        first_words = [outcome for outcome, replayed in told if not replayed]
        assert sorted(first_words) == ["ACCEPTED", "DUPLICATE", "DUPLICATE"]
    check_money_rules(read_all(db_url))


async def test_every_race_left_the_books_right(racers: tuple[Racer, Racer], db_url: str) -> None:
    check_money_rules(read_all(db_url))
