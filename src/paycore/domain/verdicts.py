"""The enumerations of the decision, numbered once for Python, Cython, the database and the wire.

The numbers are written into the database and travel over gRPC: they are never renumbered.
``_dedupe.pxd`` and ``protos/paycore/v1/payment.proto`` repeat them; a test holds all three equal.
"""

from enum import IntEnum, IntFlag


class NotifyOutcome(IntEnum):
    """What a notification turned out to be (design of the decision: docs/architecture.md)."""

    ACCEPTED = 1
    DUPLICATE = 2
    LATE = 3
    SECOND_CAPTURE = 4
    MISMATCH = 5
    CONFLICT = 6
    UNKNOWN = 7
    RECORDED = 8
    INVALID = 9
    THROTTLED = 10


class VerdictFlag(IntFlag):
    """What goes with an outcome; in a packed verdict the flags stand above the outcome's 8 bits."""

    NONE = 0
    REPLAYED = 0x100
    """This very word is on record: nothing is to be written."""
    PAID_AT_UNTRUSTED = 0x200
    """Accepted although the channel's pay time could not be believed."""
    CLOSES = 0x400
    """LATE on an open payment with no other live attempt: the outcome CLOSED(EXPIRED) is written too."""
    ASK = 0x800
    """A guess of the index that only the database may confirm."""


class PaymentState(IntEnum):
    """What became of a payment. PAID and CLOSED are final and exclude each other (R1)."""

    OPEN = 1
    PAID = 2
    CLOSED = 3


class Recorded(IntEnum):
    """How a capture compares with the captures on record for its attempt."""

    NONE = 0
    SAME = 1
    """Trade number, amount and currency are equal: a replay."""
    OTHER_TRADE = 2
    """The attempt has a capture, under another trade number."""
    OTHER_TERMS = 3
    """The trade number is on record with another amount or currency."""


class ChannelResult(IntEnum):
    """What a channel says happened to an order of its own."""

    SUCCESS = 1
    FAILURE = 2


class CaptureSource(IntEnum):
    """Who told us of a capture."""

    NOTIFICATION = 1
    SYNC_ANSWER = 2
    QUERY = 3


class CloseReason(IntEnum):
    """Why a payment was closed."""

    MERCHANT = 1
    EXPIRED = 2
    UNREACHABLE = 3
    """Long past its expiry, with an attempt about which the channel gave no final word."""


class PayMethod(IntEnum):
    """How the user pays."""

    REDIRECT = 1
    QR = 2
    CHARGE = 3


class AttemptState(IntEnum):
    """How the conversation with the channel stands. Money is not decided by it (R8)."""

    CREATING = 1
    OPEN = 2
    UNKNOWN = 3
    FAILED = 4
    CLOSED = 5


FINALLY_UNPAID = frozenset({AttemptState.FAILED, AttemptState.CLOSED})
"""Attempts in these states are not live, unless money proves otherwise."""


class RefundState(IntEnum):
    """How far a refund's current try has come."""

    PENDING = 1
    UNKNOWN = 2
    ACCEPTED = 3
    REFUNDED = 4
    REFUSED = 5
    RETURNED_BY_CHANNEL = 6
    """The channel or its network sent the money back by itself: nothing is owed any more."""
    NEEDS_ATTENTION = 7
    """Unfinished for so long, or refused so often, that a person was told. It is still asked about and sent."""


REFUND_DONE = frozenset({RefundState.REFUNDED, RefundState.RETURNED_BY_CHANNEL})
"""The money is back."""

REFUND_FINAL = REFUND_DONE | {RefundState.REFUSED}
"""The states that a final word gives to a try."""


class TaskKind(IntEnum):
    """What repair has to come back to."""

    CLOSE = 1
    """Close a payment that nobody paid; attempt 0."""
    QUERY = 2
    """Ask the channel about an attempt."""
    END = 3
    """Query an attempt that a younger one took the place of, and close it at its channel."""


EXCESS_REASONS = frozenset(
    {
        NotifyOutcome.DUPLICATE,
        NotifyOutcome.LATE,
        NotifyOutcome.SECOND_CAPTURE,
        NotifyOutcome.MISMATCH,
    }
)
"""The outcomes that a judged capture which is not kept may carry."""

QUARANTINE_REASONS = frozenset(
    {
        NotifyOutcome.SECOND_CAPTURE,
        NotifyOutcome.MISMATCH,
        NotifyOutcome.CONFLICT,
        NotifyOutcome.UNKNOWN,
    }
)
"""The outcomes of evidence that cannot be judged yet."""
