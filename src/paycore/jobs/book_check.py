"""Compares one order in a channel's books with what is on record about its attempt, capture by capture. Pure.

If nothing is found and nothing is on its way, the channel keeps exactly the captures that are kept here: the amount
once of a payment that is paid, nothing of one that is closed.
"""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.channels.books import BookCapture, BookOrder, BookRefund
from paycore.domain.audit import BOOK_GRACE_MS, AuditKind, Details, Pending, PendingKind, Violation
from paycore.store.book_facts import OurCapture, OurMoney, OurRefund

Found = Violation | Pending


class _Case(NamedTuple):
    """One order, on both sides."""

    payment_id: int
    book: BookOrder
    ours: OurMoney
    now_ms: int

    def told(self, **more: str | int | None) -> Details:
        """What names the order, and more."""
        return {"account": self.book.account, "channel_order_no": self.book.channel_order_no, **more}

    def refunds_of(self, trade_no: str) -> list[OurRefund]:
        """Our refunds of a capture."""
        return [one for one in self.ours.refunds if one.channel_trade_no == trade_no]


def check_order(payment_id: int, book: BookOrder, ours: OurMoney, now_ms: int) -> Iterator[Found]:
    """Find what differs. payment_id: 0 where the order's number is not ours; then ``ours`` is empty."""
    case = _Case(payment_id, book, ours, now_ms)
    spoken_for: set[str] = set()
    for capture in book.captures:
        recorded = ours.captures.get(capture.channel_trade_no)
        found = list(_check_unrecorded(case, capture) if recorded is None else _check_capture(case, capture, recorded))
        spoken_for.update(
            capture.channel_trade_no
            for one in found
            if one.kind in {AuditKind.BOOK_KEPT_REFUNDED, AuditKind.BOOK_REFUND_DOUBLED}
        )
        yield from found
    for refund in book.refunds:
        if refund.channel_trade_no not in spoken_for:
            yield from _check_refund(case, refund)
    taken = {one.channel_trade_no for one in book.captures}
    for trade_no in ours.captures.keys() - taken:
        yield Violation(AuditKind.BOOK_CAPTURE_ABSENT, payment_id, case.told(channel_trade_no=trade_no))


def _check_unrecorded(case: _Case, capture: BookCapture) -> Iterator[Found]:
    told = case.told(
        channel_trade_no=capture.channel_trade_no,
        amount_minor=capture.amount_minor,
        currency=capture.currency,
        paid_at_ms=capture.paid_at_ms,
    )
    is_open = case.ours.evidence.get(capture.channel_trade_no)
    if is_open is not None:
        # What a person has resolved is settled outside of paycore.
        if is_open:
            yield Pending(PendingKind.CAPTURE_IN_QUARANTINE, case.payment_id, told)
        return
    is_old = case.now_ms - capture.paid_at_ms > BOOK_GRACE_MS
    if capture.told or (is_old and not capture.telling):
        yield Violation(AuditKind.BOOK_CAPTURE_UNKNOWN, case.payment_id, told)
    else:
        yield Pending(PendingKind.CAPTURE_UNTOLD, case.payment_id, told)


def _check_capture(case: _Case, capture: BookCapture, recorded: OurCapture) -> Iterator[Found]:
    told = case.told(channel_trade_no=capture.channel_trade_no)
    if (capture.amount_minor, capture.currency) != (recorded.amount_minor, recorded.currency):
        terms: Details = {
            "book_minor": capture.amount_minor,
            "our_minor": recorded.amount_minor,
            "book_currency": capture.currency,
            "our_currency": recorded.currency,
        }
        yield Violation(AuditKind.BOOK_CAPTURE_DIFFERS, case.payment_id, {**told, **terms})
    if recorded.kept:
        yield from _check_kept(case, capture, told)
    else:
        yield from _check_excess(case, capture, told)


def _check_kept(case: _Case, capture: BookCapture, told: Details) -> Iterator[Found]:
    refunds = case.refunds_of(capture.channel_trade_no)
    asked_minor = sum(one.amount_minor for one in refunds if one.of_merchant)
    if capture.refunded_minor > asked_minor:
        amounts = {"refunded_minor": capture.refunded_minor, "asked_minor": asked_minor}
        yield Violation(AuditKind.BOOK_KEPT_REFUNDED, case.payment_id, {**told, **amounts})


def _check_excess(case: _Case, capture: BookCapture, told: Details) -> Iterator[Found]:
    done = any(one.done for one in case.refunds_of(capture.channel_trade_no))
    amounts = {"refunded_minor": capture.refunded_minor, "captured_minor": capture.amount_minor}
    if capture.refunded_minor > capture.amount_minor:
        yield Violation(AuditKind.BOOK_REFUND_DOUBLED, case.payment_id, {**told, **amounts})
    elif done and capture.refunded_minor < capture.amount_minor:
        yield Violation(AuditKind.BOOK_REFUND_NOT_DONE, case.payment_id, {**told, **amounts})
    elif not done:
        yield Pending(PendingKind.REFUND_ON_ITS_WAY, case.payment_id, {**told, **amounts})


def _check_refund(case: _Case, refund: BookRefund) -> Iterator[Found]:
    if refund.by_itself:
        # Of an excess: what was owed. Of the kept capture or twice: found with the capture.
        return
    ours = next((one for one in case.ours.refunds if refund.channel_refund_no in one.numbers), None)
    told = case.told(
        channel_refund_no=refund.channel_refund_no,
        channel_trade_no=refund.channel_trade_no,
        amount_minor=refund.amount_minor,
        currency=refund.currency,
    )
    if ours is None:
        yield Violation(AuditKind.BOOK_REFUND_UNKNOWN, case.payment_id, told)
    elif (ours.channel_trade_no, ours.amount_minor, ours.currency) != refund[1:4]:
        terms: Details = {
            "our_trade_no": ours.channel_trade_no,
            "our_minor": ours.amount_minor,
            "our_currency": ours.currency,
        }
        yield Violation(AuditKind.BOOK_REFUND_DIFFERS, case.payment_id, {**told, **terms})
