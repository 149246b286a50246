"""Breaks of R1 and R2, planted by hand: rows that no code of ours writes, by straight SQL.

``prepare`` makes the payments that plants are put on through the normal path, and each plant takes one that is whole.
``PLANTS`` names them; ``Plant.apply`` plants one and returns the payment that is to be named in what finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from paycore.domain.audit import UNJUDGED_GRACE_MS, AuditKind
from paycore.domain.ids import excess_refund_no, format_channel_refund_no
from paycore.domain.verdicts import NotifyOutcome, PaymentState, RefundState
from tests.support.books import rows, run
from tests.support.core import AMOUNT_MINOR, Core
from tests.support.planted_rows import (
    Capture,
    attempt_row,
    excess_of,
    excess_row,
    insert,
    kept_of,
    made_at_ms,
    orphan_of,
    outcome_row,
    payment_row,
    refund_rows,
    result_rows,
    try_row,
)

_OLD_MS = UNJUDGED_GRACE_MS + 1


async def prepare(core: Core, copies: int = 1) -> None:
    """Make payments of each story, as many as plants are to be put on one database; a plant takes one for itself."""
    for number in range(copies):
        await _prepare_paid(core, number)
        await _prepare_waiting(core, number)


async def _prepare_paid(core: Core, number: int) -> None:
    open_id, paid, twice = [
        await core.make_payment(*attempts) for attempts in (["bank_a"], ["bank_a"], ["bank_a", "bank_b"])
    ]
    assert open_id, "left as it is"
    await core.notify(core.word(paid, 1, f"PAID-{number}"))
    await core.notify(core.word(twice, 1, f"FIRST-{number}"))
    assert (await core.notify(core.word(twice, 2, f"SECOND-{number}"))).outcome is NotifyOutcome.DUPLICATE


async def _prepare_waiting(core: Core, number: int) -> None:
    # Expired when it is made: the first word of a payment with one attempt closes it, of one with two it waits.
    late, waiting = [
        await core.make_payment(*attempts, validity_ms=-1) for attempts in (["bank_a"], ["bank_a", "bank_b"])
    ]
    for payment_id, trade_no in ((late, f"LATE-{number}"), (waiting, f"WAITING-{number}")):
        assert (await core.notify(core.word(payment_id, 1, trade_no))).outcome is NotifyOutcome.LATE


_WHOLE = "EXISTS (SELECT 1 FROM merchant_order m WHERE m.merchant_id = p.merchant_id"
_WHOLE += " AND m.merchant_order_no = p.merchant_order_no AND m.payment_id = p.payment_id)"
_OUTCOME = "(SELECT count(*) FROM payment_outcome o WHERE o.payment_id = p.payment_id AND o.state = {state}"
_OUTCOME += " AND o.channel_trade_no LIKE '{trade_no}' AND o.amount_minor IN (0, p.amount_minor)"
_OUTCOME += " AND o.currency IN ('', p.currency) AND o.attempt < 2) = 1"
_NO_OUTCOME = "NOT EXISTS (SELECT 1 FROM payment_outcome o WHERE o.payment_id = p.payment_id)"
_EXCESS = "(SELECT count(*) FROM excess_payment e WHERE e.payment_id = p.payment_id) = {count}"
_REFUND = "(SELECT count(*) FROM refund r WHERE r.payment_id = p.payment_id) = {count}"
_TRY = "(SELECT count(*) FROM refund_try t JOIN refund r ON r.payment_id = t.payment_id AND r.refund_no = t.refund_no"
_TRY += " JOIN excess_payment e ON e.payment_id = r.payment_id AND e.attempt = r.attempt"
_TRY += " AND e.channel_trade_no = r.channel_trade_no AND e.amount_minor = r.amount_minor AND e.reason = r.reason"
_TRY += " AND e.currency = r.currency WHERE t.payment_id = p.payment_id AND t.state = 1 AND t.asks = 0 AND t.seq = 1"
_TRY += " AND r.refund_no NOT LIKE '%ffffffffffffffff'"
_TRY += " AND t.channel_refund_no LIKE '%01') = {count}"
_TRIES = "(SELECT count(*) FROM refund_try t WHERE t.payment_id = p.payment_id) = {count}"
_UNTOLD = "NOT EXISTS (SELECT 1 FROM refund_result f WHERE f.payment_id = p.payment_id)"
_UNASKED = "NOT EXISTS (SELECT 1 FROM queried_paid q WHERE q.payment_id = p.payment_id)"


def _shape(outcome: str, excess: int, refunds: int) -> str:
    counts = [_EXCESS.format(count=excess), *(one.format(count=refunds) for one in (_REFUND, _TRY, _TRIES))]
    return " AND ".join((_WHOLE, outcome, *counts, _UNTOLD, _UNASKED))


_OPEN = _shape(_NO_OUTCOME, 0, 0)
_PAID = _shape(_OUTCOME.format(state=PaymentState.PAID.value, trade_no="PAID-%"), 0, 0)
_TWICE = _shape(_OUTCOME.format(state=PaymentState.PAID.value, trade_no="FIRST-%"), 1, 1)
_LATE = _shape(_OUTCOME.format(state=PaymentState.CLOSED.value, trade_no=""), 1, 1)
_WAITING = _shape(_NO_OUTCOME, 1, 0)


def _take(url: str, shape: str) -> int:
    """The first payment of a story that no plant has been put on."""
    found = rows(url, f"SELECT min(p.payment_id) FROM payment p WHERE {shape}")[0][0]
    assert found is not None, "prepare(core, copies) made too few payments"
    return int(found)


class Plant(NamedTuple):
    """One break. what: in words; audit: the kind that the audit finds, once. A sweep: see ``sweep_finds``."""

    what: str
    audit: AuditKind
    shape: str
    break_it: Callable[[str, int], int | None]

    def put(self, url: str) -> tuple[int, int]:
        """Plant it; return the payment that it is put on, and the one that the audit is to name."""
        payment_id = _take(url, self.shape)
        other = self.break_it(url, payment_id)
        return payment_id, payment_id if other is None else other

    def apply(self, url: str) -> int:
        """Plant it; return the payment that the audit is to name."""
        return self.put(url)[1]


def _without_refund(url: str, payment_id: int) -> None:
    run(
        url,
        f"DELETE FROM refund_try WHERE payment_id = {payment_id}",
        f"DELETE FROM refund WHERE payment_id = {payment_id}",
    )


def _kept_as_excess(url: str, payment_id: int) -> None:
    run(url, excess_row(kept_of(url, payment_id), made_at_ms(url, payment_id)))


def _second_refund(url: str, payment_id: int) -> None:
    capture = excess_of(url, payment_id)
    run(url, *refund_rows(capture, made_at_ms(url, payment_id), "X02ffffffffffffffff"))


def _changed(table: str, change: str) -> Callable[[str, int], None]:
    """A break that changes a column of one row."""

    def break_it(url: str, payment_id: int) -> None:
        run(url, f"UPDATE {table} SET {change} WHERE payment_id = {payment_id}")

    return break_it


def _refund_before_outcome(url: str, payment_id: int) -> None:
    run(url, *refund_rows(excess_of(url, payment_id), made_at_ms(url, payment_id)),
        f"UPDATE refund SET reason = {NotifyOutcome.LATE:d} WHERE payment_id = {payment_id}")  # fmt: skip


def _kept_refunded(url: str, payment_id: int) -> None:
    run(url, *refund_rows(kept_of(url, payment_id), made_at_ms(url, payment_id)))


def _renumbered(url: str, payment_id: int) -> None:
    number = "X02ffffffffffffffff"
    run(url, f"UPDATE refund SET refund_no = '{number}' WHERE payment_id = {payment_id}",
        f"UPDATE refund_try SET refund_no = '{number}', channel_refund_no ="
        f" '{format_channel_refund_no(payment_id, number, 1)}' WHERE payment_id = {payment_id}")  # fmt: skip


def _refund_of_nothing(url: str, payment_id: int) -> None:
    run(url, *refund_rows(Capture(payment_id, 1, "NOBODY"), made_at_ms(url, payment_id)))


def _without_try(url: str, payment_id: int) -> None:
    run(url, f"DELETE FROM refund_try WHERE payment_id = {payment_id}")


def _try_of_nothing(url: str, payment_id: int) -> None:
    run(url, try_row(payment_id, excess_refund_no(1, "NOBODY"), 1, made_at_ms(url, payment_id)))


def _tries(first: RefundState | None, seq: int) -> Callable[[str, int], None]:
    """Another try, of a number that should not be there, after a first with this final word."""

    def break_it(url: str, payment_id: int) -> None:
        capture, at_ms = excess_of(url, payment_id), made_at_ms(url, payment_id)
        told = [] if first is None else result_rows(capture, 1, at_ms, first)
        run(url, *told, try_row(payment_id, capture.refund_no, seq, at_ms))

    return break_it


def _two_successes(second: RefundState) -> Callable[[str, int], None]:
    def break_it(url: str, payment_id: int) -> None:
        capture, at_ms = excess_of(url, payment_id), made_at_ms(url, payment_id)
        first = result_rows(capture, 1, at_ms)
        run(url, *first, try_row(payment_id, capture.refund_no, 2, at_ms), *result_rows(capture, 2, at_ms, second))

    return break_it


def _told(seq: int, state: RefundState) -> Callable[[str, int], None]:
    """A final word, of a try that does not say so."""

    def break_it(url: str, payment_id: int) -> None:
        told = result_rows(excess_of(url, payment_id), seq, made_at_ms(url, payment_id))
        run(url, *told, f"UPDATE refund_try SET state = {state:d} WHERE payment_id = {payment_id}")

    return break_it


def _excess_on_nothing(url: str, payment_id: int) -> None:
    capture, at_ms = Capture(payment_id, 63, "NOWHERE"), made_at_ms(url, payment_id)
    run(url, excess_row(capture, at_ms), *refund_rows(capture, at_ms))


def _orphan_outcome(url: str, payment_id: int) -> int:
    orphan = orphan_of(url, payment_id)
    run(url, outcome_row(orphan, made_at_ms(url, payment_id)))
    return orphan


def _orphan_excess(url: str, payment_id: int) -> int:
    orphan = orphan_of(url, payment_id)
    run(url, excess_row(Capture(orphan, 1, "ORPHAN"), made_at_ms(url, payment_id)))
    return orphan


def _orphan_attempt(url: str, payment_id: int) -> int:
    orphan = orphan_of(url, payment_id)
    run(url, attempt_row(orphan, 1, made_at_ms(url, payment_id)))
    return orphan


def _order_of_nothing(url: str, payment_id: int) -> int:
    orphan = orphan_of(url, payment_id)
    run(url, f"UPDATE merchant_order SET payment_id = {orphan} WHERE payment_id = {payment_id}")
    return orphan


def _order_of_another(url: str, payment_id: int) -> int:
    other = int(rows(url, f"SELECT max(payment_id) FROM payment WHERE payment_id <> {payment_id}")[0][0])
    run(url, f"UPDATE merchant_order SET payment_id = {other} WHERE payment_id = {payment_id}")
    return other


def _without_order(url: str, payment_id: int) -> None:
    run(url, f"DELETE FROM merchant_order WHERE payment_id = {payment_id}")


def _second_payment(url: str, payment_id: int) -> int:
    (order_no,) = rows(url, f"SELECT merchant_order_no FROM payment WHERE payment_id = {payment_id}")[0]
    second = orphan_of(url, payment_id)
    run(url, payment_row(second, made_at_ms(url, payment_id), order_no))
    return second


def _merchant_refunds(*amounts_minor: int, trade_no: str = "") -> Callable[[str, int], None]:
    """Refunds of the merchant's, of the kept capture or of one that there is not."""

    def break_it(url: str, payment_id: int) -> None:
        kept, at_ms = kept_of(url, payment_id), made_at_ms(url, payment_id)
        capture = kept._replace(trade_no=trade_no or kept.trade_no)
        for number, amount_minor in enumerate(amounts_minor):
            run(url, *refund_rows(capture, at_ms, f"M{number:018x}", amount_minor))

    return break_it


def _merchant_refund_in_yen(url: str, payment_id: int) -> None:
    _merchant_refunds(1)(url, payment_id)
    _changed("refund", "currency = 'JPY'")(url, payment_id)


def _queried_paid(url: str, payment_id: int) -> None:
    run(url, insert("queried_paid", made_at_ms(url, payment_id) - _OLD_MS, payment_id=payment_id, attempt=1))


_TERMS, _EARLY = AuditKind.REFUND_TERMS_DIFFER, AuditKind.TRY_TOO_EARLY
_STATE, _MERCHANT = AuditKind.TRY_STATE_WRONG, AuditKind.MERCHANT_REFUNDS_EXCEED

PLANTS: Mapping[str, Plant] = {
    "duplicate_without_refund": Plant(
        "the second capture of a paid payment has no refund",
        AuditKind.REFUND_MISSING, _TWICE, _without_refund),
    "late_without_refund": Plant(
        "the capture of a closed payment has no refund",
        AuditKind.REFUND_MISSING, _LATE, _without_refund),
    "kept_is_excess": Plant(
        "the kept capture is excess too", AuditKind.KEPT_IS_EXCESS, _PAID, _kept_as_excess),
    "refunded_under_two_numbers": Plant(
        "an excess has a second refund", AuditKind.REFUND_DOUBLED, _TWICE, _second_refund),
    "refund_of_more": Plant(
        "a refund is of one unit more than was captured",
        _TERMS, _TWICE, _changed("refund", "amount_minor = amount_minor + 1")),
    "refund_in_another_currency": Plant(
        "a refund is in another currency", _TERMS, _TWICE, _changed("refund", "currency = 'JPY'")),
    "refund_of_another_attempt": Plant(
        "a refund names another attempt", _TERMS, _TWICE, _changed("refund", "attempt = 1")),
    "refund_of_another_trade": Plant(
        "a refund names another trade number",
        _TERMS, _TWICE, _changed("refund", "channel_trade_no = 'ANOTHER'")),
    "refund_for_another_reason": Plant(
        "a refund gives another reason than its excess",
        _TERMS, _TWICE, _changed("refund", f"reason = {NotifyOutcome.LATE:d}")),
    "refund_before_the_outcome": Plant(
        "an excess of an open payment has a refund",
        AuditKind.REFUND_WITHOUT_OUTCOME, _WAITING, _refund_before_outcome),
    "kept_refunded": Plant(
        "the kept capture has a refund", AuditKind.REFUND_OF_KEPT, _PAID, _kept_refunded),
    "refund_renumbered": Plant(
        "a refund's number does not follow from its capture",
        AuditKind.REFUND_NUMBER_WRONG, _TWICE, _renumbered),
    "refund_of_nothing": Plant(
        "a refund of a capture that nobody made",
        AuditKind.REFUND_WITHOUT_CAPTURE, _PAID, _refund_of_nothing),
    "refund_without_try": Plant(
        "a refund has no try", AuditKind.REFUND_WITHOUT_TRY, _TWICE, _without_try),
    "try_without_refund": Plant(
        "a try has no refund", AuditKind.TRY_WITHOUT_REFUND, _PAID, _try_of_nothing),
    "try_renumbered": Plant(
        "a try is sent under a number that does not follow from it",
        AuditKind.TRY_NUMBER_WRONG, _TWICE, _changed("refund_try", "channel_refund_no = 'ANY'")),
    "try_before_a_final_word": Plant(
        "a second try beside a first without a final word", _EARLY, _TWICE, _tries(None, 2)),
    "try_after_the_money_went_back": Plant(
        "a second try after the first was refunded", _EARLY, _TWICE, _tries(RefundState.REFUNDED, 2)),
    "try_skipped": Plant(
        "a third try without a second", _EARLY, _TWICE, _tries(RefundState.REFUSED, 3)),
    "refunded_twice": Plant(
        "two tries of one refund sent money back",
        AuditKind.REFUNDED_TWICE, _TWICE, _two_successes(RefundState.REFUNDED)),
    "returned_and_refunded": Plant(
        "the channel returned the money by itself and it was refunded too",
        AuditKind.REFUNDED_TWICE, _TWICE, _two_successes(RefundState.RETURNED_BY_CHANNEL)),
    "refunded_without_a_word": Plant(
        "a try says REFUNDED, no final word is on record",
        _STATE, _TWICE, _changed("refund_try", f"state = {RefundState.REFUNDED:d}")),
    "pending_with_a_word": Plant(
        "a try says PENDING, a final word is on record", _STATE, _TWICE, _told(1, RefundState.PENDING)),
    "refused_against_the_word": Plant(
        "a try says REFUSED, the final word REFUNDED", _STATE, _TWICE, _told(1, RefundState.REFUSED)),
    "result_without_try": Plant(
        "a final word about a try that there is not",
        AuditKind.RESULT_WITHOUT_TRY, _TWICE, _told(2, RefundState.PENDING)),
    "kept_amount_differs": Plant(
        "less is kept than was asked",
        AuditKind.KEPT_TERMS_DIFFER, _PAID, _changed("payment_outcome", "amount_minor = amount_minor - 1")),
    "kept_currency_differs": Plant(
        "the kept capture is in another currency",
        AuditKind.KEPT_TERMS_DIFFER, _PAID, _changed("payment_outcome", "currency = 'JPY'")),
    "kept_attempt_missing": Plant(
        "kept by an attempt that there is not",
        AuditKind.KEPT_ATTEMPT_MISSING, _PAID, _changed("payment_outcome", "attempt = 63")),
    "paid_without_trade": Plant(
        "paid by a capture without a trade number",
        AuditKind.OUTCOME_INCOHERENT, _PAID, _changed("payment_outcome", "channel_trade_no = ''")),
    "closed_with_trade": Plant(
        "closed, with a trade number all the same",
        AuditKind.OUTCOME_INCOHERENT, _LATE, _changed("payment_outcome", "channel_trade_no = 'KEPT'")),
    "excess_attempt_missing": Plant(
        "an excess of an attempt that there is not",
        AuditKind.EXCESS_ATTEMPT_MISSING, _PAID, _excess_on_nothing),
    "outcome_without_payment": Plant(
        "an outcome of no payment", AuditKind.OUTCOME_WITHOUT_PAYMENT, _PAID, _orphan_outcome),
    "excess_without_payment": Plant(
        "an excess of no payment", AuditKind.EXCESS_WITHOUT_PAYMENT, _PAID, _orphan_excess),
    "attempt_without_payment": Plant(
        "an attempt of no payment", AuditKind.ATTEMPT_WITHOUT_PAYMENT, _PAID, _orphan_attempt),
    "order_names_nothing": Plant(
        "a merchant order names no payment", AuditKind.ORDER_NAMES_NO_PAYMENT, _OPEN, _order_of_nothing),
    "order_names_another": Plant(
        "a merchant order names another order's payment",
        AuditKind.ORDER_NAMES_NO_PAYMENT, _OPEN, _order_of_another),
    "order_missing": Plant(
        "a payment without its merchant order", AuditKind.PAYMENT_WITHOUT_ORDER, _OPEN, _without_order),
    "second_payment_of_an_order": Plant(
        "a second payment of one merchant order", AuditKind.PAYMENT_WITHOUT_ORDER, _OPEN, _second_payment),
    "merchant_refunds_exceed": Plant(
        "two refunds of the merchant's are more than was captured",
        _MERCHANT, _PAID, _merchant_refunds(AMOUNT_MINOR, 1)),
    "merchant_refund_of_another_capture": Plant(
        "a refund of the merchant's names another capture than the kept one",
        _MERCHANT, _PAID, _merchant_refunds(1, trade_no="ANOTHER")),
    "merchant_refund_of_a_closed_payment": Plant(
        "a refund of the merchant's where nothing is kept",
        _MERCHANT, _LATE, _merchant_refunds(1, trade_no="ANY")),
    "merchant_refund_in_another_currency": Plant(
        "a refund of the merchant's is in another currency than the kept capture",
        _MERCHANT,
        _PAID,
        _merchant_refund_in_yen,
    ),
    "queried_paid": Plant(
        "the channel said that an attempt is paid, and no capture of it is on record",
        AuditKind.QUERIED_PAID_UNJUDGED, _OPEN, _queried_paid),
}  # fmt: skip
