"""Rows as values, one class a table; the fields are the columns, in the columns' order."""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState, NotifyOutcome, PaymentState


class Stamp(NamedTuple):
    """When a fact was recorded and where it stands in its writer's stream of commits."""

    recorded_at_ms: int
    writer_no: int
    group_no: int


class PaymentRow(NamedTuple):
    """What was asked."""

    payment_id: int
    merchant_id: str
    merchant_order_no: str
    amount_minor: int
    currency: str
    subject: str
    return_url: str
    terms_digest: str
    expire_at_ms: int
    recorded_at_ms: int
    writer_no: int
    group_no: int


class ChannelOrderRow(NamedTuple):
    """One attempt and how the conversation about it stands."""

    payment_id: int
    attempt: int
    channel: str
    account: str
    method: int
    expire_at_ms: int
    state: int
    state_at_ms: int
    credential: str
    failure_code: str
    failure_message: str
    failed_at_ms: int | None
    superseded_at_ms: int | None
    lease_until_ms: int
    lease_token: str
    recorded_at_ms: int
    writer_no: int
    group_no: int


class OutcomeRow(NamedTuple):
    """The one final fact about a payment."""

    payment_id: int
    state: int
    attempt: int
    channel_trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int | None
    received_at_ms: int
    source: int
    paid_at_untrusted: int
    close_reason: int
    recorded_at_ms: int
    writer_no: int
    group_no: int


class ExcessRow(NamedTuple):
    """A judged capture that is not kept."""

    payment_id: int
    attempt: int
    channel_trade_no: str
    reason: int
    amount_minor: int
    currency: str
    paid_at_ms: int | None
    received_at_ms: int
    source: int
    recorded_at_ms: int
    writer_no: int
    group_no: int


class RefundRow(NamedTuple):
    """The intent to send a capture back."""

    payment_id: int
    refund_no: str
    attempt: int
    channel_trade_no: str
    amount_minor: int
    currency: str
    reason: int
    recorded_at_ms: int
    writer_no: int
    group_no: int


class RefundTryRow(NamedTuple):
    """One number sent to the channel for a refund, and how it stands."""

    payment_id: int
    refund_no: str
    seq: int
    channel_refund_no: str
    slice: int
    state: int
    state_at_ms: int
    asks: int
    next_at_ms: int
    lease_until_ms: int
    lease_token: str
    last_error: str
    recorded_at_ms: int
    writer_no: int
    group_no: int


class RefundResultRow(NamedTuple):
    """The channel's final word about one try."""

    payment_id: int
    refund_no: str
    seq: int
    result: int
    code: str
    message: str
    recorded_at_ms: int
    writer_no: int
    group_no: int


class QuarantineRow(NamedTuple):
    """Evidence that cannot be judged yet."""

    quarantine_id: str
    reason: int
    payment_id: int | None
    attempt: int | None
    result: int
    channel: str
    account: str
    channel_order_no: str
    channel_trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int | None
    source: int
    raw: bytes
    headers: str
    first_seen_at_ms: int
    last_seen_at_ms: int
    arrivals: int
    is_open: int
    resolutions: str
    recorded_at_ms: int
    writer_no: int
    group_no: int


class TaskRow(NamedTuple):
    """Something that repair comes back to. attempt: 0 where it is about the payment as a whole."""

    payment_id: int
    kind: int
    attempt: int
    slice: int
    next_at_ms: int
    looks: int
    since_ms: int
    last_error: str
    recorded_at_ms: int
    writer_no: int
    group_no: int


# Asked for each word that is judged on its rows: a call of an enumeration costs a microsecond.
_STATES = {int(state): state for state in PaymentState}
_OUTCOMES = {int(outcome): outcome for outcome in NotifyOutcome}


class RecordedCapture(NamedTuple):
    """A capture on record, kept or not, with the outcome that it got and the commit that wrote it.

    untrusted: kept although its pay time could not be believed.
    """

    attempt: int
    channel_trade_no: str
    amount_minor: int
    currency: str
    outcome: NotifyOutcome
    untrusted: bool
    writer_no: int
    group_no: int


def _recorded(row: OutcomeRow | ExcessRow, outcome: NotifyOutcome, *, untrusted: bool = False) -> RecordedCapture:
    return RecordedCapture(
        row.attempt,
        row.channel_trade_no,
        row.amount_minor,
        row.currency,
        outcome,
        untrusted,
        row.writer_no,
        row.group_no,
    )


class PaymentRecord:
    """What is on record about one payment and decides about its captures.

    Mutable on purpose: whoever decides a group of notifications adds what it is about to write, so that the
    next notification of the same payment is judged against it.
    """

    __slots__ = ("attempts", "excess", "outcome", "payment")

    def __init__(self, payment: PaymentRow) -> None:
        self.payment = payment
        self.attempts: dict[int, ChannelOrderRow] = {}
        self.outcome: OutcomeRow | None = None
        self.excess: list[ExcessRow] = []

    @property
    def state(self) -> PaymentState:
        """OPEN until there is an outcome."""
        return PaymentState.OPEN if self.outcome is None else _STATES[self.outcome.state]

    def captures(self) -> Iterator[RecordedCapture]:
        """Every judged capture on record."""
        kept = self.outcome
        if kept is not None and kept.state == PaymentState.PAID:
            yield _recorded(kept, NotifyOutcome.ACCEPTED, untrusted=bool(kept.paid_at_untrusted))
        for row in self.excess:
            yield _recorded(row, _OUTCOMES[row.reason])

    def is_kept(self, attempt: int, channel_trade_no: str) -> bool:
        """Whether this capture is the one that the payment keeps."""
        kept = self.outcome
        return kept is not None and (kept.attempt, kept.channel_trade_no) == (attempt, channel_trade_no)

    def captured_attempts(self) -> set[int]:
        """The attempts that have a judged capture."""
        captured = {row.attempt for row in self.excess}
        if self.outcome is not None and self.outcome.state == PaymentState.PAID:
            captured.add(self.outcome.attempt)
        return captured

    def captured_mask(self) -> int:
        """The same as bits: attempt n is bit n - 1."""
        mask = 0
        for attempt in self.captured_attempts():
            mask |= 1 << (attempt - 1)
        return mask

    def note_failure(self, attempt: int, at_ms: int, *, ends: bool) -> None:
        """Note a channel's word that an attempt failed; ``ends``: a live conversation ends by it."""
        row = self.attempts[attempt]
        if ends and row.state not in FINALLY_UNPAID:
            row = row._replace(state=AttemptState.FAILED, state_at_ms=at_ms)
        self.attempts[attempt] = row._replace(failed_at_ms=at_ms)

    def live_attempts(self) -> list[ChannelOrderRow]:
        """The attempts that are neither finally unpaid nor hold a judged capture, oldest first."""
        captured = self.captured_attempts()
        return [
            row for row in self.attempts.values() if row.state not in FINALLY_UNPAID and row.attempt not in captured
        ]


MAX_QUARANTINE_IN_FILE = 100
"""Entries of quarantine that a payment's file holds: what comes from outside must not make it too large to read."""


class PaymentFile(NamedTuple):
    """Everything on record about one payment, for reading. quarantine: the entries seen first, of quarantine_total."""

    record: PaymentRecord
    refunds: list[RefundRow]
    refund_tries: list[RefundTryRow]
    refund_results: list[RefundResultRow]
    quarantine: list[QuarantineRow]
    quarantine_total: int
