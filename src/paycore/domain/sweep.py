"""What a sweep can find: each way in which something that must be on record can be missing.

A sweep puts right what it finds, by the same rules as those who should have done it, and counts it. In a healthy system
it finds nothing.
"""

from enum import StrEnum


class SweepKind(StrEnum):
    """The value is the label ``kind`` of ``paycore_sweep_found_total``."""

    SEVERAL_CAPTURES = "several_captures"
    """A paid payment holds a capture that it does not keep and that has no refund."""
    CLOSED_WITH_CAPTURE = "closed_with_capture"
    """A closed payment holds a capture that has no refund."""
    PAID_AT_CHANNEL = "paid_at_channel"
    """The channel said, when asked, that an attempt is paid, and nothing that it said was judged."""
    EXPIRED_WITH_EXCESS = "expired_with_excess"
    """An expired payment without outcome holds an excess capture, and nobody is going to close it."""
    REFUND_WITHOUT_TRY = "refund_without_try"
    """A refund that nobody is going to send: it has no try."""
    REFUND_STUCK = "refund_stuck"
    """A refund whose last try was finally refused, and that has no next one."""
    PAYMENT_WITHOUT_TASK = "payment_without_task"
    """An open payment that nobody is going to close, or an attempt that nobody is going to ask about."""
    CONTRADICTION = "contradiction"
    """Rows that contradict each other. A sweep leaves them as they are: a person has to look."""
