"""Tells what contradicts itself on a payment: each way in which rows can break R1 or R2.

Pure, and with its own idea of each rule: it shares nothing with the audit, the writer or the decision.
"""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.domain.ids import MAX_REFUND_TRIES, excess_refund_no, format_channel_refund_no
from paycore.domain.sweep import SweepKind
from paycore.domain.verdicts import PaymentState, RefundState
from paycore.store.rows import ExcessRow, RefundRow, RefundTryRow
from paycore.store.sweep_suspects import FINAL_WORDS, OF_MERCHANT
from paycore.store.sweeps import SweepCase

_MONEY_WENT_BACK = (RefundState.REFUNDED, RefundState.RETURNED_BY_CHANNEL)


class Contradiction(NamedTuple):
    """Rows that only a person can put right."""

    kind: SweepKind
    what: str
    attempt: int
    reference: str
    """A trade number, a refund's number or a merchant order's."""


def contradictions(case: SweepCase) -> Iterator[Contradiction]:
    """Find what contradicts something else, on a payment that there is."""
    yield from _of_payment(case)
    for row in case.record.excess:
        yield from _of_excess(case, row)
    for refund in case.refunds:
        if not is_of_merchant(refund):
            yield from _of_refund(case, refund)
    yield from _of_merchant(case)
    for refund_no in sorted(_numbers(case)):
        yield from _of_tries(case, refund_no)


def contradiction(what: str, attempt: int, reference: str) -> Contradiction:
    """Say what contradicts what."""
    return Contradiction(SweepKind.CONTRADICTION, what, attempt, reference)


def is_of_merchant(refund: RefundRow) -> bool:
    """Whether a merchant asked for a refund; any other is of an excess."""
    return refund.refund_no.startswith(OF_MERCHANT)


def refunds_of(case: SweepCase, row: ExcessRow) -> list[RefundRow]:
    """Return the refunds that name a capture, whoever asked for them."""
    capture = (row.attempt, row.channel_trade_no)
    return [one for one in case.refunds if (one.attempt, one.channel_trade_no) == capture]


def is_of_terms(refund: RefundRow, row: ExcessRow) -> bool:
    """Whether a refund returns just what was captured."""
    return (refund.amount_minor, refund.currency) == (row.amount_minor, row.currency)


def _of_payment(case: SweepCase) -> Iterator[Contradiction]:
    payment, kept = case.record.payment, case.record.outcome
    if not case.is_ordered:
        yield contradiction("its merchant order does not name it", 0, payment.merchant_order_no)
    if kept is None:
        return
    named = (kept.attempt, kept.channel_trade_no)
    if kept.state == PaymentState.CLOSED:
        if kept.channel_trade_no or kept.currency or kept.amount_minor:
            yield contradiction("closed, and keeps a capture all the same", *named)
        return
    if not kept.channel_trade_no:
        yield contradiction("paid by a capture without a trade number", *named)
    if (kept.amount_minor, kept.currency) != (payment.amount_minor, payment.currency):
        yield contradiction("the kept capture is of other terms than were asked", *named)
    if kept.attempt not in case.record.attempts:
        yield contradiction("kept by an attempt that there is not", *named)


def _of_excess(case: SweepCase, row: ExcessRow) -> Iterator[Contradiction]:
    capture = (row.attempt, row.channel_trade_no)
    if row.attempt not in case.record.attempts:
        yield contradiction("excess of an attempt that there is not", *capture)
    if case.record.is_kept(*capture):
        yield contradiction("the kept capture is excess too", *capture)
    elif case.record.outcome is not None:
        yield from _of_surplus(case, row)


def _of_surplus(case: SweepCase, row: ExcessRow) -> Iterator[Contradiction]:
    capture, refunds = (row.attempt, row.channel_trade_no), refunds_of(case, row)
    if not refunds:
        if is_number_taken(case, row):
            yield contradiction("its refund names another capture", *capture)
    elif len(refunds) > 1:
        yield contradiction("it has several refunds", *capture)
    elif not is_of_terms(refunds[0], row):
        yield contradiction("its refund is of another amount", *capture)
    elif refunds[0].reason != row.reason:
        yield contradiction("its refund gives another reason", *capture)


def is_number_taken(case: SweepCase, row: ExcessRow) -> bool:
    """Whether a refund bears the number of this capture's."""
    number = excess_refund_no(row.attempt, row.channel_trade_no)
    return any(one.refund_no == number for one in case.refunds)


def _of_refund(case: SweepCase, refund: RefundRow) -> Iterator[Contradiction]:
    capture, named = (refund.attempt, refund.channel_trade_no), (refund.attempt, refund.refund_no)
    if case.record.outcome is None:
        yield contradiction("refunded before there is an outcome", *named)
    if case.record.is_kept(*capture):
        yield contradiction("the kept capture has a refund", *named)
    elif capture not in {(row.attempt, row.channel_trade_no) for row in case.record.excess}:
        yield contradiction("a refund of what is no capture", *named)
    elif refund.refund_no != excess_refund_no(*capture):
        yield contradiction("a refund's number does not follow from its capture", *named)


def _of_merchant(case: SweepCase) -> Iterator[Contradiction]:
    """What the merchant sends back, and has not finally failed, lies between nothing and the kept capture."""
    kept = case.record.outcome
    standing = [one for one in case.refunds if is_of_merchant(one) and not _has_failed(case, one)]
    if kept is None or kept.state != PaymentState.PAID:
        astray = standing
    else:
        terms = (kept.attempt, kept.channel_trade_no, kept.currency)
        astray = [one for one in standing if (one.attempt, one.channel_trade_no, one.currency) != terms]
    for refund in astray:
        yield contradiction("a merchant's refund is not of the kept capture", refund.attempt, refund.refund_no)
    if not astray and kept is not None and sum(one.amount_minor for one in standing) > kept.amount_minor:
        for refund in standing:
            yield contradiction("the merchant's refunds are more than was kept", refund.attempt, refund.refund_no)


def _has_failed(case: SweepCase, refund: RefundRow) -> bool:
    results = [row for row in case.results if row.refund_no == refund.refund_no]
    last = max((row.seq for row in case.tries if row.refund_no == refund.refund_no), default=0)
    return any(row.result == RefundState.REFUSED and row.seq >= last for row in results)


def _numbers(case: SweepCase) -> set[str]:
    return {row.refund_no for row in case.tries} | {row.refund_no for row in case.results}


def _of_tries(case: SweepCase, refund_no: str) -> Iterator[Contradiction]:
    """What is wrong between the tries of one refund and the final words about them (R6)."""
    tries = [row for row in case.tries if row.refund_no == refund_no]
    words = {row.seq: row.result for row in case.results if row.refund_no == refund_no}
    attempt = next((one.attempt for one in case.refunds if one.refund_no == refund_no), None)
    named = (attempt or 0, refund_no)
    if attempt is None:
        yield contradiction("tries of a refund that there is not", *named)
    for one in tries:
        yield from (contradiction(what, *named) for what in _wrong_with(one, words))
    if words.keys() - {one.seq for one in tries}:
        yield contradiction("a final word about a try that there is not", *named)
    if sum(word in _MONEY_WENT_BACK for word in words.values()) > 1:
        yield contradiction("the money of one refund went back more than once", *named)
    if len(words) == MAX_REFUND_TRIES and set(words.values()) == {RefundState.REFUSED}:
        yield contradiction("every try was refused", *named)


def _wrong_with(one: RefundTryRow, words: dict[int, int]) -> Iterator[str]:
    if one.channel_refund_no != format_channel_refund_no(one.payment_id, one.refund_no, one.seq):
        yield "a try's number does not follow from it"
    if one.seq > 1 and words.get(one.seq - 1) != RefundState.REFUSED:
        yield "tried again though the last try was not refused"
    word = words.get(one.seq)
    if word != one.state and (word is not None or one.state in FINAL_WORDS):
        yield "a try does not say what the final word about it says"
