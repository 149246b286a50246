"""What an audit can find: each way in which a database, or a channel's own books beside it, can break R1 or R2.

One break is named once, by the kind nearest to its cause: a kind says which of the others it goes before.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class AuditKind(StrEnum):
    """The value is the label ``kind`` of ``paycore_audit_violations``."""

    ORDER_NAMES_NO_PAYMENT = "order_names_no_payment"
    """A merchant order names a payment that does not exist, or one of another order."""
    PAYMENT_WITHOUT_ORDER = "payment_without_order"
    """A payment that its merchant order does not name: the order is missing, or names a second payment of it."""
    ATTEMPT_WITHOUT_PAYMENT = "attempt_without_payment"
    """An attempt of a payment that does not exist."""
    OUTCOME_WITHOUT_PAYMENT = "outcome_without_payment"
    """An outcome of a payment that does not exist."""
    EXCESS_WITHOUT_PAYMENT = "excess_without_payment"
    """An excess capture of a payment that does not exist."""
    OUTCOME_INCOHERENT = "outcome_incoherent"
    """An outcome PAID without a trade number, or CLOSED with what only a capture has."""
    KEPT_ATTEMPT_MISSING = "kept_attempt_missing"
    """The kept capture is of an attempt that its payment does not have."""
    KEPT_TERMS_DIFFER = "kept_terms_differ"
    """The kept capture has another amount or currency than its payment."""
    KEPT_IS_EXCESS = "kept_is_excess"
    """A capture is both kept and excess."""
    EXCESS_ATTEMPT_MISSING = "excess_attempt_missing"
    """An excess capture is of an attempt that its payment does not have."""
    REFUND_MISSING = "refund_missing"
    """An excess capture of a payment with an outcome has no refund."""
    REFUND_DOUBLED = "refund_doubled"
    """An excess capture has more than one refund. Their numbers are not looked at."""
    REFUND_TERMS_DIFFER = "refund_terms_differ"
    """A refund has another amount, currency, attempt, trade number or reason than its excess capture."""
    REFUND_NUMBER_WRONG = "refund_number_wrong"
    """A refund of an excess capture has another number than the one that follows from the capture."""
    REFUND_WITHOUT_OUTCOME = "refund_without_outcome"
    """A refund of an excess capture whose payment has no outcome yet."""
    REFUND_OF_KEPT = "refund_of_kept"
    """A refund, of the kind that an excess has, of the capture that is kept."""
    REFUND_WITHOUT_CAPTURE = "refund_without_capture"
    """A refund of what is no capture on record."""
    MERCHANT_REFUNDS_EXCEED = "merchant_refunds_exceed"
    """The merchant's refunds that have not finally failed are more than the kept capture, or name another one."""
    REFUND_WITHOUT_TRY = "refund_without_try"
    """A refund that has no try: nobody will ever send it."""
    TRY_WITHOUT_REFUND = "try_without_refund"
    """A try of a refund that does not exist."""
    TRY_NUMBER_WRONG = "try_number_wrong"
    """A try is sent under another number than the one that follows from its payment, refund and place."""
    TRY_TOO_EARLY = "try_too_early"
    """A try after the first, whose predecessor was not finally refused."""
    TRY_STATE_WRONG = "try_state_wrong"
    """A try's state and the final word about it contradict each other."""
    REFUNDED_TWICE = "refunded_twice"
    """One refund has two tries by which money finally went back. Goes before TRY_TOO_EARLY."""
    RESULT_WITHOUT_TRY = "result_without_try"
    """A final word about a try that does not exist."""
    QUERIED_PAID_UNJUDGED = "queried_paid_unjudged"
    """The channel said that an attempt is paid, and after ``UNJUDGED_GRACE_MS`` no capture of it is on record."""

    BOOK_CAPTURE_UNKNOWN = "book_capture_unknown"
    """The channel took money that is on record nowhere here, though it was told, or nobody waits for it any more."""
    BOOK_CAPTURE_ABSENT = "book_capture_absent"
    """A capture is on record here, kept or excess, that the channel's books do not have."""
    BOOK_CAPTURE_DIFFERS = "book_capture_differs"
    """A capture has another amount or currency in the channel's books than here."""
    BOOK_KEPT_REFUNDED = "book_kept_refunded"
    """The channel has sent back of the kept capture what no merchant asked for: it keeps less than the amount."""
    BOOK_REFUND_DOUBLED = "book_refund_doubled"
    """The channel has sent back more of an excess capture than it took."""
    BOOK_REFUND_UNKNOWN = "book_refund_unknown"
    """The channel has sent money back under a number that was never issued here."""
    BOOK_REFUND_DIFFERS = "book_refund_differs"
    """The channel has sent back another amount, currency or trade than the number stands for here."""
    BOOK_REFUND_NOT_DONE = "book_refund_not_done"
    """A refund is on record here as done, and the channel still keeps the money."""


class PendingKind(StrEnum):
    """What is on its way between the channel's books and the database: no break, but to be over soon."""

    CAPTURE_UNTOLD = "capture_untold"
    """The channel took money and has not told it, or was not acknowledged."""
    CAPTURE_IN_QUARANTINE = "capture_in_quarantine"
    """The capture lies in quarantine, open."""
    REFUND_ON_ITS_WAY = "refund_on_its_way"
    """An excess capture that the channel still holds, or whose refund has no final word here."""


BOOK_GRACE_MS = 3_600_000
"""How long a capture that was not acknowledged may be unknown here: the recoverer asks at least every half an hour."""

UNJUDGED_GRACE_MS = 600_000
"""How long what a channel said when it was asked may be without a judgement: it is noted before it is judged."""


Details = Mapping[str, str | int | None]
"""What helps whoever looks into it, by name."""


class Violation(NamedTuple):
    """One break. payment_id: 0 where it is of no payment of ours; details: what differs, and where."""

    kind: AuditKind
    payment_id: int
    details: Details


class Pending(NamedTuple):
    """One thing that is on its way; the rest is as of a ``Violation``."""

    kind: PendingKind
    payment_id: int
    details: Details
