"""What a full pass of the sweeper makes of each plant of ``tests.support.planting``."""

from __future__ import annotations

from collections.abc import Mapping

from paycore.domain.sweep import SweepKind

REPAIRED: Mapping[str, SweepKind] = {
    "duplicate_without_refund": SweepKind.SEVERAL_CAPTURES,
    "late_without_refund": SweepKind.CLOSED_WITH_CAPTURE,
    "refund_without_try": SweepKind.REFUND_WITHOUT_TRY,
}
"""Plant -> what it is put right as."""

ASKED = frozenset({"queried_paid"})
"""The channel is asked, and as long as it gives no answer the payment is looked at again."""

_OTHER_AMOUNT = "its refund is of another amount"
_OTHER_CAPTURE = "its refund names another capture"
_TOO_EARLY = "tried again though the last try was not refused"
_TWICE = "the money of one refund went back more than once"
_WORD = "a try does not say what the final word about it says"
_TERMS = "the kept capture is of other terms than were asked"
_NO_PAYMENT = "rows of a payment that there is not"
_ORDER = "its merchant order does not name it"
_ASTRAY = "a merchant's refund is not of the kept capture"

TOLD: Mapping[str, str] = {
    "kept_is_excess": "the kept capture is excess too",
    "refunded_under_two_numbers": "it has several refunds",
    "refund_of_more": _OTHER_AMOUNT,
    "refund_in_another_currency": _OTHER_AMOUNT,
    "refund_of_another_attempt": _OTHER_CAPTURE,
    "refund_of_another_trade": _OTHER_CAPTURE,
    "refund_for_another_reason": "its refund gives another reason",
    "refund_before_the_outcome": "refunded before there is an outcome",
    "kept_refunded": "the kept capture has a refund",
    "refund_renumbered": "a refund's number does not follow from its capture",
    "refund_of_nothing": "a refund of what is no capture",
    "try_without_refund": "tries of a refund that there is not",
    "try_renumbered": "a try's number does not follow from it",
    "try_before_a_final_word": _TOO_EARLY,
    "try_after_the_money_went_back": _TOO_EARLY,
    "try_skipped": _TOO_EARLY,
    "refunded_twice": _TWICE,
    "returned_and_refunded": _TWICE,
    "refunded_without_a_word": _WORD,
    "pending_with_a_word": _WORD,
    "refused_against_the_word": _WORD,
    "result_without_try": "a final word about a try that there is not",
    "kept_amount_differs": _TERMS,
    "kept_currency_differs": _TERMS,
    "kept_attempt_missing": "kept by an attempt that there is not",
    "paid_without_trade": "paid by a capture without a trade number",
    "closed_with_trade": "closed, and keeps a capture all the same",
    "excess_attempt_missing": "excess of an attempt that there is not",
    "outcome_without_payment": _NO_PAYMENT,
    "excess_without_payment": _NO_PAYMENT,
    "attempt_without_payment": _NO_PAYMENT,
    "order_names_nothing": _ORDER,
    "order_names_another": _ORDER,
    "order_missing": _ORDER,
    "second_payment_of_an_order": _ORDER,
    "merchant_refunds_exceed": "the merchant's refunds are more than was kept",
    "merchant_refund_of_another_capture": _ASTRAY,
    "merchant_refund_of_a_closed_payment": _ASTRAY,
    "merchant_refund_in_another_currency": _ASTRAY,
}
"""Plant -> the contradiction that a person is told of."""

NAMES_ITS_OWN = frozenset({"order_names_nothing", "order_names_another"})
"""Plants of which a sweep names the payment that they were put on: it goes by payments, the audit by orders."""
