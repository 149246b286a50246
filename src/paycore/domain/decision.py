"""The decision about a success: the plain twin of ``_dedupe.decide``.

The twin exists to be read and to be tested against; the server runs the compiled one. Both are pure and
see comparisons, not texts: who asks has already compared account, amount and captures with what is
on record, in the index by codes or in the database by values.
"""

from typing import NamedTuple

from paycore.domain.verdicts import NotifyOutcome, PaymentState, Recorded, VerdictFlag

PAID_AT_AHEAD_LIMIT_MS = 5 * 60 * 1000
"""A pay time further ahead of its arrival than this is not believed."""

ABSENT_MS = -1
"""Stands for a pay time that the channel did not give."""


class Facts(NamedTuple):
    """What is on record about a capture's payment and attempt.

    known: payment and attempt exist. account_matches: channel and account are the attempt's.
    recorded: how the capture compares with the attempt's captures on record. recorded_outcome: the
    outcome of the equal one; 0 unless ``recorded`` is SAME. terms_match: amount and currency are the
    payment's. state: OPEN, PAID or CLOSED. other_live: another attempt is live.
    """

    known: bool
    account_matches: bool
    recorded: int
    recorded_outcome: int
    terms_match: bool
    state: int
    other_live: bool
    created_at_ms: int
    expire_at_ms: int


class Moment(NamedTuple):
    """When a capture was made and heard of.

    paid_at_ms: by the channel's clock, ``ABSENT_MS`` when not given. received_at_ms: when it
    arrived here; for evidence out of quarantine, when it was first seen. late_grace_ms: how long after expiry a
    payment in the channel's clock still counts as in time.
    """

    paid_at_ms: int
    received_at_ms: int
    late_grace_ms: int


def paid_at_trusted(created_at_ms: int, paid_at_ms: int, received_at_ms: int) -> bool:
    """Whether a channel's pay time may be believed: neither before the payment nor far ahead of its arrival."""
    return created_at_ms <= paid_at_ms <= received_at_ms + PAID_AT_AHEAD_LIMIT_MS


def decide(facts: Facts, moment: Moment) -> int:
    """Judge one success. Returns the outcome in the low 8 bits, ``VerdictFlag`` bits above them."""
    if not facts.known:
        return NotifyOutcome.UNKNOWN
    if not facts.account_matches:
        return NotifyOutcome.CONFLICT
    if facts.recorded == Recorded.SAME:
        return facts.recorded_outcome | VerdictFlag.REPLAYED
    if facts.recorded == Recorded.OTHER_TRADE:
        return NotifyOutcome.SECOND_CAPTURE
    if facts.recorded == Recorded.OTHER_TERMS or not facts.terms_match:
        return NotifyOutcome.MISMATCH
    if facts.state == PaymentState.PAID:
        return NotifyOutcome.DUPLICATE
    if facts.state == PaymentState.CLOSED:
        return NotifyOutcome.LATE
    return _decide_open(facts, moment)


def _decide_open(facts: Facts, moment: Moment) -> int:
    if not paid_at_trusted(facts.created_at_ms, moment.paid_at_ms, moment.received_at_ms):
        return NotifyOutcome.ACCEPTED | VerdictFlag.PAID_AT_UNTRUSTED
    pay_time_ms = min(moment.paid_at_ms, moment.received_at_ms)
    if pay_time_ms <= facts.expire_at_ms + moment.late_grace_ms:
        return NotifyOutcome.ACCEPTED
    return NotifyOutcome.LATE if facts.other_live else NotifyOutcome.LATE | VerdictFlag.CLOSES
