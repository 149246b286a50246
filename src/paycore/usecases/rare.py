"""Judges notifications one by one on the rows of their payments, and plans what they write.

For whatever the index cannot answer alone: second captures, replays, lateness, failures, evidence for quarantine, and
whoever lost the insert of an outcome to another process. The rows are current, and stay so until the transaction ends.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from paycore._dedupe import decide
from paycore._wire import Batch
from paycore.domain.decision import ABSENT_MS, Facts, Moment
from paycore.domain.ids import ChannelOrderNo, created_at_ms, parse_channel_order_no
from paycore.domain.notification import Notification, Verdict, quarantine_id
from paycore.domain.verdicts import (
    EXCESS_REASONS,
    QUARANTINE_REASONS,
    ChannelResult,
    CloseReason,
    NotifyOutcome,
    PaymentState,
    Recorded,
    VerdictFlag,
)
from paycore.store.protocol import FailureNote, WriteTransaction
from paycore.store.rows import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentRecord,
    QuarantineRow,
    RecordedCapture,
    Stamp,
)
from paycore.usecases.quarantine import QuarantineBudget
from paycore.usecases.refund import RefundIntent, derive_refunds, split_intents

_OUTCOME_MASK = 0xFF
_FLAGS_MASK = ~_OUTCOME_MASK


class RareItem:
    """A word that the index could not answer, and where it stands."""

    __slots__ = ("at", "batch", "notification", "order")

    def __init__(self, batch: Batch, at: int, notification: Notification) -> None:
        self.batch = batch
        self.at = at
        self.notification = notification
        self.order = parse_channel_order_no(notification.channel_order_no)


class Judged(NamedTuple):
    """A word that was judged on the rows, and its answer."""

    notification: Notification
    verdict: Verdict


class Terms(NamedTuple):
    """What a whole group is judged by. own_tries: see ``GroupJudge.judge``; accounts: code of (channel, account)."""

    stamp: Stamp
    late_grace_ms: int
    own_tries: frozenset[tuple[int, int]]
    accounts: Callable[[str, str], int]
    budget: QuarantineBudget


class _Evidence(NamedTuple):
    """What a word would add to quarantine. place: where the word stands among those judged."""

    place: int
    row: QuarantineRow


class RarePlan:
    """What a round of the rare path is going to write. Records change as it is made, so the next is judged on it."""

    def __init__(self, records: dict[int, PaymentRecord], terms: Terms, quarantined: Counter[int]) -> None:
        self._records = records
        self._stamp = terms.stamp
        self._late_grace_ms = terms.late_grace_ms
        self._own_tries = terms.own_tries
        self._terms = terms
        self._quarantined = quarantined
        self._own_seen: set[tuple[int, int, str]] = set()
        self._judged: list[tuple[RareItem, Verdict]] = []
        self.outcomes: list[OutcomeRow] = []
        self._excess: list[ExcessRow] = []
        self._failures: list[FailureNote] = []
        self._evidence: list[_Evidence] = []

    def add(self, item: RareItem) -> None:
        """Judge one notification and plan what it writes."""
        notification, order = item.notification, item.order
        record = self._records.get(order.payment_id) if order else None
        attempt = record.attempts.get(order.attempt) if record and order else None
        if notification.result == ChannelResult.FAILURE:
            packed = self._judge_failure(notification, attempt)
        else:
            packed = self._judge_success(notification, order, record, attempt)
        outcome = NotifyOutcome(packed & _OUTCOME_MASK)
        if outcome in QUARANTINE_REASONS and not packed & VerdictFlag.REPLAYED:
            row = _quarantine_row(notification, order, outcome, self._stamp)
            self._evidence.append(_Evidence(len(self._judged), row))
        self._judged.append((item, _verdict(packed, order if attempt else None)))

    def answer(self) -> list[Judged]:
        """Answer the words whose payments did not lose; return them with their answers."""
        for item, verdict in self._judged:
            packed = int(verdict.outcome) | int(verdict.flags)
            item.batch.answer(item.at, packed, verdict.payment_id, verdict.attempt)
        return [Judged(item.notification, verdict) for item, verdict in self._judged]

    def waiting(self) -> list[int]:
        """Payments whose new excess waits for an outcome: nobody may give them one that has not seen it."""
        return sorted({row.payment_id for row in self._excess if self._records[row.payment_id].outcome is None})

    def write(self, transaction: WriteTransaction, lost: set[int]) -> list[RefundIntent]:
        """Write what follows from the outcomes that stand; return the refunds that are owed."""
        excess = [row for row in self._excess if row.payment_id not in lost]
        if excess:
            transaction.insert_excess(excess)
        intents = self._owed(excess, lost)
        if intents:
            transaction.insert_refunds(*split_intents(intents))
        failures = [note for note in self._failures if note.payment_id not in lost]
        if failures:
            transaction.note_failures(failures)
        evidence = [one for one in self._evidence if one.row.payment_id not in lost]
        if evidence:
            self._put_quarantine(transaction, evidence)
        self._judged = [
            (item, verdict) for item, verdict in self._judged if not item.order or item.order.payment_id not in lost
        ]
        return intents

    def _put_quarantine(self, transaction: WriteTransaction, evidence: Sequence[_Evidence]) -> None:
        """Keep evidence; what is new and beyond the allowance of its source is not kept, and its word throttled."""
        on_record = transaction.evidence_on_record({row.quarantine_id for _, row in evidence})
        rows: dict[str, QuarantineRow] = {}
        for place, row in evidence:
            before = rows.get(row.quarantine_id)
            if before is not None:
                rows[row.quarantine_id] = before._replace(
                    last_seen_at_ms=row.last_seen_at_ms, arrivals=before.arrivals + 1
                )
            elif self._may_keep(row, on_record.get(row.quarantine_id)):
                rows[row.quarantine_id] = row
            else:
                item, verdict = self._judged[place]
                throttled = verdict._replace(outcome=NotifyOutcome.THROTTLED, flags=VerdictFlag.NONE)
                self._judged[place] = (item, throttled)
        if rows:
            transaction.put_quarantine(list(rows.values()), maybe_counted=bool(self._own_tries))

    def _may_keep(self, row: QuarantineRow, recorded_by: tuple[int, int] | None) -> bool:
        """Whether evidence is on record already, or within its source's allowance, which it then takes."""
        if recorded_by is not None and recorded_by not in self._own_tries:
            return True
        source = self._terms.accounts(row.channel, row.account)
        # What an earlier try of this group wrote is there, and takes its allowance now.
        if recorded_by is None and self._quarantined[source] >= self._terms.budget.room(
            source, self._stamp.recorded_at_ms
        ):
            return False
        self._quarantined[source] += 1
        return True

    def _owed(self, new_excess: Sequence[ExcessRow], lost: set[int]) -> list[RefundIntent]:
        """Refunds for the new excess, and where the outcome is new too, for the excess that waited for it."""
        owing: dict[int, list[ExcessRow]] = {}
        for row in new_excess:
            owing.setdefault(row.payment_id, []).append(row)
        for outcome in self.outcomes:
            if outcome.payment_id not in lost:
                owing[outcome.payment_id] = self._records[outcome.payment_id].excess
        return [
            intent
            for payment_id, rows in owing.items()
            for intent in derive_refunds(self._records[payment_id], rows, self._stamp)
        ]

    def _judge_failure(self, notification: Notification, attempt: ChannelOrderRow | None) -> int:
        if attempt is None:
            return NotifyOutcome.UNKNOWN
        if (attempt.channel, attempt.account) != (notification.channel, notification.account):
            return NotifyOutcome.CONFLICT
        if attempt.failed_at_ms is not None:
            # An earlier try of this group wrote it where it is of the very moment at which this word arrived.
            own = bool(self._own_tries) and attempt.failed_at_ms == notification.received_at_ms
            return NotifyOutcome.RECORDED if own else NotifyOutcome.RECORDED | VerdictFlag.REPLAYED
        record, at_ms = self._records[attempt.payment_id], notification.received_at_ms
        ends = attempt.attempt not in record.captured_attempts()
        self._failures.append(
            FailureNote(
                attempt.payment_id,
                attempt.attempt,
                notification.failure_code,
                notification.failure_message,
                at_ms,
                ends,
            )
        )
        record.note_failure(attempt.attempt, at_ms, ends=ends)
        return NotifyOutcome.RECORDED

    def _judge_success(
        self,
        notification: Notification,
        order: ChannelOrderNo | None,
        record: PaymentRecord | None,
        attempt: ChannelOrderRow | None,
    ) -> int:
        if order is None or record is None or attempt is None:
            return NotifyOutcome.UNKNOWN
        recorded, capture = compare_capture(record, order.attempt, notification)
        packed = decide(
            _facts(notification, record, attempt, recorded, capture),
            Moment(notification.paid_at_ms, notification.received_at_ms, self._late_grace_ms),
        )
        if capture is not None and packed & VerdictFlag.REPLAYED:
            return self._own_or_replayed(packed, order, capture)
        self._record(notification, order, record, packed)
        return packed

    def _own_or_replayed(self, packed: int, order: ChannelOrderNo, capture: RecordedCapture) -> int:
        """Tell a replay from what an earlier try of this group wrote itself; the latter counts once."""
        if capture.untrusted:
            packed |= VerdictFlag.PAID_AT_UNTRUSTED
        key = (order.payment_id, order.attempt, capture.channel_trade_no)
        if (capture.writer_no, capture.group_no) in self._own_tries and key not in self._own_seen:
            self._own_seen.add(key)
            return packed & ~VerdictFlag.REPLAYED
        return packed

    def _record(self, notification: Notification, order: ChannelOrderNo, record: PaymentRecord, packed: int) -> None:
        outcome = NotifyOutcome(packed & _OUTCOME_MASK)
        if outcome == NotifyOutcome.ACCEPTED:
            self._set_outcome(record, paid_outcome(notification, order, _verdict(packed, order), self._stamp))
        if packed & VerdictFlag.CLOSES:
            received_at_ms = notification.received_at_ms
            self._set_outcome(
                record, closed_outcome(order.payment_id, CloseReason.EXPIRED, received_at_ms, self._stamp)
            )
        if outcome in EXCESS_REASONS and outcome not in QUARANTINE_REASONS:
            row = _excess_row(notification, order, outcome, self._stamp)
            record.excess.append(row)
            self._excess.append(row)

    def _set_outcome(self, record: PaymentRecord, row: OutcomeRow) -> None:
        record.outcome = row
        self.outcomes.append(row)


def compare_capture(
    record: PaymentRecord, attempt: int, notification: Notification
) -> tuple[Recorded, RecordedCapture | None]:
    """Compare a success with the captures on record for its attempt; the equal or same-numbered one comes along."""
    best: tuple[Recorded, RecordedCapture | None] = (Recorded.NONE, None)
    for capture in record.captures():
        if capture.attempt != attempt:
            continue
        if capture.channel_trade_no != notification.channel_trade_no:
            if best[0] == Recorded.NONE:
                best = (Recorded.OTHER_TRADE, None)
        elif (capture.amount_minor, capture.currency) == (notification.amount_minor, notification.currency):
            return Recorded.SAME, capture
        else:
            best = (Recorded.OTHER_TERMS, capture)
    return best


def _facts(
    notification: Notification,
    record: PaymentRecord,
    attempt: ChannelOrderRow,
    recorded: Recorded,
    capture: RecordedCapture | None,
) -> Facts:
    payment = record.payment
    return Facts(
        known=True,
        account_matches=(attempt.channel, attempt.account) == (notification.channel, notification.account),
        recorded=recorded,
        recorded_outcome=capture.outcome if capture is not None and recorded == Recorded.SAME else 0,
        terms_match=(payment.amount_minor, payment.currency) == (notification.amount_minor, notification.currency),
        state=record.state,
        # Looked for only where it matters: while the payment is open.
        other_live=record.outcome is None and any(row.attempt != attempt.attempt for row in record.live_attempts()),
        created_at_ms=created_at_ms(payment.payment_id),
        expire_at_ms=payment.expire_at_ms,
    )


@functools.cache
def _unpack(packed: int) -> tuple[NotifyOutcome, VerdictFlag]:
    return NotifyOutcome(packed & _OUTCOME_MASK), VerdictFlag(packed & _FLAGS_MASK)


def _verdict(packed: int, order: ChannelOrderNo | None) -> Verdict:
    outcome, flags = _unpack(int(packed))
    return Verdict(outcome, flags) if order is None else Verdict(outcome, flags, *order)


def _given_ms(paid_at_ms: int) -> int | None:
    return None if paid_at_ms == ABSENT_MS else paid_at_ms


def paid_outcome(notification: Notification, order: ChannelOrderNo, verdict: Verdict, stamp: Stamp) -> OutcomeRow:
    """The outcome of a payment whose capture is kept."""
    return OutcomeRow(
        order.payment_id,
        PaymentState.PAID,
        order.attempt,
        notification.channel_trade_no,
        notification.amount_minor,
        notification.currency,
        _given_ms(notification.paid_at_ms),
        notification.received_at_ms,
        notification.source,
        int(verdict.paid_at_untrusted),
        0,
        *stamp,
    )


def closed_outcome(payment_id: int, reason: CloseReason, at_ms: int, stamp: Stamp) -> OutcomeRow:
    """The outcome of a payment that keeps no money."""
    return OutcomeRow(payment_id, PaymentState.CLOSED, 0, "", 0, "", None, at_ms, 0, 0, reason, *stamp)


def _excess_row(notification: Notification, order: ChannelOrderNo, reason: NotifyOutcome, stamp: Stamp) -> ExcessRow:
    return ExcessRow(
        order.payment_id,
        order.attempt,
        notification.channel_trade_no,
        reason,
        notification.amount_minor,
        notification.currency,
        _given_ms(notification.paid_at_ms),
        notification.received_at_ms,
        notification.source,
        *stamp,
    )


def _quarantine_row(
    notification: Notification, order: ChannelOrderNo | None, reason: NotifyOutcome, stamp: Stamp
) -> QuarantineRow:
    return QuarantineRow(
        quarantine_id(notification, reason),
        reason,
        order.payment_id if order else None,
        order.attempt if order else None,
        notification.result,
        notification.channel,
        notification.account,
        notification.channel_order_no,
        notification.channel_trade_no,
        notification.amount_minor,
        notification.currency,
        _given_ms(notification.paid_at_ms),
        notification.source,
        notification.raw,
        notification.headers,
        notification.received_at_ms,
        notification.received_at_ms,
        1,
        1,
        "[]",
        *stamp,
    )
