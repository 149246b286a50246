"""The audit against a real bank's own books: each way in which the two differ, and what is only on its way."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from paycore.channels.books import BookCapture, BookOrder, BookRefund, BooksUnreadableError
from paycore.channels.protocol import RefundAnswer, RefundOrder
from paycore.channels.simbank_books import SimbankBooks
from paycore.domain.audit import BOOK_GRACE_MS, AuditKind, PendingKind
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import NotifyOutcome
from paycore.jobs.auditor import Auditor, Report
from paycore.jobs.book_check import check_order
from paycore.store.book_facts import OurCapture, OurMoney, OurRefund
from tests.support.bank import Street, Town
from tests.support.books import run
from tests.support.clock import ManualClock
from tests.support.core import AMOUNT_MINOR, Core
from tests.support.databases import make_database
from tests.support.planted_rows import excess_of, made_at_ms, result_rows
from tests.support.planting import PLANTS, prepare
from tests.support.simbank import Receiver, adapter, an_order

BOTH = ("bank_a", "bank_b")
TIMEOUT_MS = 10_000


async def audited(town: Town) -> Report:
    return await _audit_core(town.core, str(town.driver.http.base_url))


def breaks(report: Report) -> Counter[tuple[AuditKind, int]]:
    return Counter((one.kind, one.payment_id) for one in report.violations)


def on_its_way(report: Report) -> Counter[tuple[PendingKind, int]]:
    return Counter((one.kind, one.payment_id) for one in report.pending)


async def opened(town: Town, *banks: str, **faults: Any) -> int:
    """A payment with an open page at each bank."""
    command = town.order()
    for bank in banks:
        town.plant(command, bank=bank, **faults)
        result = await town.core.pay(command._replace(account=bank))
    payment_id: int = result.payment.payment_id
    return payment_id


async def paid(town: Town, **faults: Any) -> int:
    """Paid once, and told of."""
    payment_id = await opened(town, "bank_a", **faults)
    town.user_pays(payment_id)
    await town.hand_on(payment_id)
    return payment_id


async def twice_paid(town: Town, **faults: Any) -> int:
    """Paid at both banks, told of both times; the second is owed back."""
    payment_id = await opened(town, *BOTH, **faults)
    for attempt, bank in enumerate(BOTH, start=1):
        town.user_pays(payment_id, attempt, bank)
        await town.hand_on(payment_id, attempt)
    return payment_id


async def test_capture_of_an_order_that_is_not_ours_is_explained_by_the_word_that_lies_in_quarantine(
    alone: Town,
) -> None:
    channel = adapter(str(alone.driver.http.base_url))
    order_no = f"OTHER-{id(alone):x}"
    await channel.create(an_order(order_no))
    await channel.aclose()
    (trade_no,) = [one["trade_no"] for one in alone.driver.pay(order_no)["captures"]]
    alone.driver.settled(order_no)
    assert breaks(await audited(alone)) == {(AuditKind.BOOK_CAPTURE_UNKNOWN, 0): 1}
    word = alone.core.word(1, trade_no=trade_no)._replace(channel_order_no=order_no)
    assert (await alone.core.notify(word)).outcome == NotifyOutcome.UNKNOWN
    report = await audited(alone)
    assert (breaks(report), on_its_way(report)) == ({}, {(PendingKind.CAPTURE_IN_QUARANTINE, 0): 1})
    assert report.pending[0].details["account"] == "bank_a"


async def test_books_of_every_story_agree_and_what_is_on_its_way_is_named(alone: Town) -> None:
    await opened(alone, "bank_a")
    await paid(alone)
    finished = await twice_paid(alone)
    await alone.refund(passes=2)
    assert alone.kept_minor(finished, (1, "bank_a"), (2, "bank_b")) == AMOUNT_MINOR
    returned = await twice_paid(alone)
    (capture,) = alone.books(returned, 2, "bank_b")["captures"]
    alone.driver.give_back(format_channel_order_no(returned, 2), capture["trade_no"], "bank_b")
    owed = await twice_paid(alone)
    untold = await opened(alone, "bank_a", notify_never=True)
    alone.user_pays(untold)
    wrong = await opened(alone, "bank_a", notify_amount_minor=AMOUNT_MINOR - 1)
    alone.user_pays(wrong)
    assert [one.outcome for one in await alone.hand_on(wrong)] == [NotifyOutcome.MISMATCH]
    report = await audited(alone)
    assert breaks(report) == Counter()
    assert report.book_orders == 10
    assert on_its_way(report) == Counter(
        [
            (PendingKind.REFUND_ON_ITS_WAY, returned),
            (PendingKind.REFUND_ON_ITS_WAY, owed),
            (PendingKind.CAPTURE_UNTOLD, untold),
            (PendingKind.CAPTURE_IN_QUARANTINE, wrong),
        ]
    )
    await alone.refund(passes=2)
    alone.clock.advance(BOOK_GRACE_MS + 60_000)
    report = await audited(alone)
    assert breaks(report) == Counter({(AuditKind.BOOK_CAPTURE_UNKNOWN, untold): 1})
    assert on_its_way(report) == Counter([(PendingKind.CAPTURE_IN_QUARANTINE, wrong)])


async def test_each_way_in_which_the_books_differ_is_found(alone: Town, db_url: str) -> None:
    expected = [
        (AuditKind.BOOK_CAPTURE_UNKNOWN, await _acknowledged_and_forgotten(alone)),
        (AuditKind.BOOK_CAPTURE_ABSENT, await _made_up(alone)),
        (AuditKind.BOOK_CAPTURE_ABSENT, await _made_up_without_an_order(alone)),
        (AuditKind.BOOK_CAPTURE_DIFFERS, await _captured_otherwise(alone, db_url)),
        (AuditKind.BOOK_KEPT_REFUNDED, await _kept_sent_back(alone)),
        (AuditKind.BOOK_REFUND_UNKNOWN, await _sent_back_by_another(alone)),
        (AuditKind.BOOK_REFUND_DIFFERS, await _sent_back_in_part(alone)),
        (AuditKind.BOOK_REFUND_NOT_DONE, await _said_to_be_back(alone, db_url)),
    ]
    assert breaks(await audited(alone)) == Counter(expected)


async def _acknowledged_and_forgotten(town: Town) -> int:
    payment_id = await opened(town, "bank_a")
    town.user_pays(payment_id)
    town.driver.settled(format_channel_order_no(payment_id, 1))
    return payment_id


async def _made_up(town: Town) -> int:
    payment_id = await opened(town, "bank_a")
    await town.core.notify(town.core.word(payment_id, 1, "MADE-UP"))
    return payment_id


async def _made_up_without_an_order(town: Town) -> int:
    payment_id = await town.core.make_payment()
    await town.core.notify(town.core.word(payment_id, 1, "MADE-UP-TOO"))
    return payment_id


async def _captured_otherwise(town: Town, url: str) -> int:
    payment_id = await twice_paid(town)
    more = f"SET amount_minor = amount_minor + 1 WHERE payment_id = {payment_id}"
    run(url, f"UPDATE excess_payment {more}", f"UPDATE refund {more}")
    return payment_id


async def _kept_sent_back(town: Town) -> int:
    payment_id = await paid(town)
    await _send_back(town, payment_id, 1, "bank_a", "ANY-NUMBER", AMOUNT_MINOR)
    return payment_id


async def _sent_back_by_another(town: Town) -> int:
    payment_id = await twice_paid(town)
    await _send_back(town, payment_id, 2, "bank_b", "ANOTHER-NUMBER", AMOUNT_MINOR)
    return payment_id


async def _sent_back_in_part(town: Town) -> int:
    payment_id = await twice_paid(town)
    (sent,) = (await town.file(payment_id)).refund_tries
    await _send_back(town, payment_id, 2, "bank_b", sent.channel_refund_no, AMOUNT_MINOR - 1)
    return payment_id


async def _said_to_be_back(town: Town, url: str) -> int:
    payment_id = await twice_paid(town)
    run(url, *result_rows(excess_of(url, payment_id), 1, made_at_ms(url, payment_id)))
    return payment_id


async def _send_back(town: Town, payment_id: int, attempt: int, bank: str, number: str, amount_minor: int) -> None:
    """Somebody beside paycore sends money back."""
    (capture,) = town.books(payment_id, attempt, bank)["captures"]
    order_no = format_channel_order_no(payment_id, attempt)
    channel = adapter(str(town.driver.http.base_url))
    order = RefundOrder(bank, number, order_no, capture["trade_no"], amount_minor, "CNY")
    assert (await channel.refund(order)).answer is RefundAnswer.REFUNDED
    await channel.aclose()


async def test_books_are_read_page_by_page_to_their_end(street: Street) -> None:
    channel = adapter(street.bank.url)
    numbers = [f"page-{number}" for number in range(5)]
    for number in numbers:
        await channel.create(an_order(number))
    books = SimbankBooks(street.bank.url, TIMEOUT_MS, page_orders=2)
    assert list(await books.accounts()) == ["bank_a", "bank_b", "bank_c"]
    pages = [page async for page in books.pages()]
    assert {len(page) for page in pages} <= {1, 2}
    told = [order.channel_order_no for page in pages for order in page if order.account == "bank_a"]
    assert told == sorted(set(told))
    assert set(numbers) <= set(told)
    assert [one.channel_order_no for one in await books.orders("bank_a", [*numbers, "none"])] == numbers
    await books.aclose()
    await channel.aclose()


class _Overtaken(SimbankBooks):
    """Between a page of the books and our look at the database a payment is made and told of."""

    def __init__(self, town: Town, payment_id: int) -> None:
        super().__init__(str(town.driver.http.base_url), TIMEOUT_MS)
        self._town, self._payment_id = town, payment_id

    async def pages(self) -> AsyncIterator[Sequence[BookOrder]]:
        async for page in super().pages():
            if any(one.channel_order_no == format_channel_order_no(self._payment_id, 1) for one in page):
                self._town.user_pays(self._payment_id)
                await self._town.hand_on(self._payment_id)
            yield page


async def test_payment_made_while_the_books_are_read_is_no_difference(alone: Town) -> None:
    core, payment_id = alone.core, await opened(alone, "bank_a")
    auditor = Auditor(
        store=core.store, clock=core.clock, metrics=core.metrics, open_books=lambda: _Overtaken(alone, payment_id)
    )
    report = await auditor.audit()
    assert (breaks(report), report.book_orders) == (Counter(), 1)
    assert (await alone.file(payment_id)).record.outcome is not None


def a_page(**changes: object) -> bytes:
    capture = {"trade_no": "T1", "amount_minor": 1, "currency": "CNY", "paid_at_ms": 1, "refunded_minor": 0}
    order = {"order_no": "1", "captures": [capture | changes], "refunds": [], "notifications": []}
    return json.dumps({"banks": {"bank_a": {"orders": [order]}}}).encode()


GARBAGE: dict[str, tuple[int, bytes]] = {
    "no_json": (200, b"<html>busy</html>"),
    "empty": (200, b""),
    "no_object": (200, b"[]"),
    "no_banks": (200, b"{}"),
    "banks_no_object": (200, b'{"banks": ["bank_a"]}'),
    "orders_missing": (200, b'{"banks": {"bank_a": {}}}'),
    "amount_a_fraction": (200, a_page(amount_minor=1.5)),
    "amount_too_large": (200, a_page(amount_minor=2**63)),
    "amount_a_truth": (200, a_page(amount_minor=True)),
    "trade_no_a_number": (200, a_page(trade_no=7)),
    "paid_at_absent": (200, a_page(paid_at_ms=None)),
    "error": (500, b"{}"),
    "forbidden": (403, b"{}"),
}


@pytest.mark.parametrize("garbage", GARBAGE)
async def test_books_that_are_none_are_said_to_be_unreadable(garbage: str) -> None:
    receiver = Receiver()
    receiver.answer = lambda _: GARBAGE[garbage]
    books = SimbankBooks(receiver.url, TIMEOUT_MS)
    try:
        with pytest.raises(BooksUnreadableError) as refused:
            [page async for page in books.pages()]
    finally:
        await books.aclose()
        receiver.close()
    assert "\n" not in str(refused.value)


async def test_bank_that_hangs_up_leaves_what_the_database_showed(tmp_path: Path) -> None:
    receiver = Receiver()
    receiver.answer = lambda _: None
    url = make_database("sqlite", tmp_path)
    try:
        with Core(url, clock=ManualClock()) as core:
            await prepare(core)
            planted = PLANTS["kept_refunded"].apply(url)
            report = await _audit_core(core, receiver.url)
    finally:
        receiver.close()
    assert breaks(report) == Counter({(AuditKind.REFUND_OF_KEPT, planted): 1})
    assert report.book_orders is None
    assert "cannot be read" in report.books_error


async def _audit_core(core: Core, url: str) -> Report:
    open_books = functools.partial(SimbankBooks, url, TIMEOUT_MS)
    return await Auditor(store=core.store, clock=core.clock, metrics=core.metrics, open_books=open_books).audit()


CAPTURE = BookCapture("T", 10, "CNY", 1, 0, told=True, telling=False)
REFUND = BookRefund("R1", "T", 10, "CNY", by_itself=False)
OWED = OurRefund("X01", "T", 10, "CNY", False, frozenset({"R1"}))
BACK = OWED._replace(done=True)
ASKED = OurRefund("M01", "T", 4, "CNY", True, frozenset({"R1"}))
KEPT, EXCESS = OurCapture(10, "CNY", True), OurCapture(10, "CNY", False)

# (the bank's capture, its refunds, our capture, our refunds, what is found): what no simulated bank can be brought to.
PAIRS: dict[str, tuple[BookCapture, list[BookRefund], OurCapture, list[OurRefund], list[str]]] = {
    "kept": (CAPTURE, [], KEPT, [], []),
    "kept_merchant_refund": (
        CAPTURE._replace(refunded_minor=4), [REFUND._replace(amount_minor=4)], KEPT, [ASKED], []),
    "kept_more_than_the_merchant_asked": (
        CAPTURE._replace(refunded_minor=5), [REFUND._replace(amount_minor=4)], KEPT, [ASKED], ["book_kept_refunded"]),
    "kept_returned": (
        CAPTURE._replace(refunded_minor=10), [REFUND._replace(by_itself=True)], KEPT, [], ["book_kept_refunded"]),
    "excess_back": (CAPTURE._replace(refunded_minor=10), [REFUND], EXCESS, [BACK], []),
    "excess_accepted": (CAPTURE, [REFUND], EXCESS, [OWED], ["refund_on_its_way"]),
    "excess_doubled": (
        CAPTURE._replace(refunded_minor=20),
        [REFUND, REFUND._replace(channel_refund_no="R2")], EXCESS, [BACK], ["book_refund_doubled"]),
    "excess_returned_and_refunded": (
        CAPTURE._replace(refunded_minor=20),
        [REFUND, REFUND._replace(by_itself=True)], EXCESS, [BACK], ["book_refund_doubled"]),
    "excess_of_another_trade": (
        CAPTURE._replace(refunded_minor=10), [REFUND],
        EXCESS, [OWED._replace(channel_trade_no="U")], ["refund_on_its_way", "book_refund_differs"]),
    "currency": (CAPTURE._replace(currency="JPY"), [], KEPT, [], ["book_capture_differs"]),
}  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_pair_of_captures_is_judged(pair: str) -> None:
    capture, refunds, ours, our_refunds, expected = PAIRS[pair]
    book = BookOrder("bank_a", "101", (capture,), tuple(refunds))
    money = OurMoney("simbank", "bank_a", {"T": ours}, our_refunds, {})
    assert [one.kind.value for one in check_order(1, book, money, 2)] == expected
