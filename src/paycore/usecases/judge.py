"""Decides a group of notifications inside one write transaction.

Fast: the index says that a success is the first and in time; one insert tries for the outcome, and the
payment's key arbitrates. Everything else, and whoever lost that insert, is decided on the rows themselves.

Order of writing: outcomes first; then, from the outcomes that really stand, excess and refunds. Deciding
in memory that 2 is a duplicate of 1 and then losing 1 to another process would refund the money that was kept.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from paycore._dedupe import Index, decide
from paycore.domain.decision import ABSENT_MS, Facts, Moment
from paycore.domain.ids import ChannelOrderNo, created_at_ms, parse_channel_order_no
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.notification import Notification, Verdict, quarantine_id
from paycore.domain.verdicts import (
    EXCESS_REASONS,
    QUARANTINE_REASONS,
    CaptureSource,
    ChannelResult,
    CloseReason,
    NotifyOutcome,
    PaymentState,
    Recorded,
    VerdictFlag,
)
from paycore.failpoint import failpoint
from paycore.store.outcomes import PlainOutcomes
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
from paycore.usecases.refund import RefundIntent, derive_refunds, split_intents

AccountCodes = Callable[[str, str], int]
"""Turns (channel, account) into the account's code in the index; 0 when it is not configured."""

_OUTCOME_MASK = 0xFF
_FLAGS_MASK = ~_OUTCOME_MASK
# Plain integers, as in ``domain.notification``: operations on enumerated values are slow where each word passes.
_ACCEPTED = int(NotifyOutcome.ACCEPTED)
_ASK = int(VerdictFlag.ASK)


class GroupResult(NamedTuple):
    """The answers, in the order asked, and the refunds that the group made new, by reason."""

    verdicts: list[Verdict]
    refunds: list[RefundIntent]


def index_payment(index: Index, record: PaymentRecord, accounts: AccountCodes) -> None:
    """Tell the index what the database says about a payment."""
    payment, outcome = record.payment, record.outcome
    count = max(record.attempts, default=0)
    codes = tuple(
        accounts(row.channel, row.account) if (row := record.attempts.get(attempt)) else 0
        for attempt in range(1, count + 1)
    )
    index.put(
        payment.payment_id,
        payment.amount_minor,
        CURRENCY_CODES.get(payment.currency, 0),
        payment.expire_at_ms,
        record.state,
        outcome.attempt if outcome else 0,
        count,
        record.captured_mask(),
        codes,
    )


class GroupJudge:
    """Judges groups with one index. Belongs to the writer thread; holds no group of its own."""

    def __init__(self, index: Index, accounts: AccountCodes, late_grace_ms: int) -> None:
        self._index = index
        self._accounts = accounts
        self._late_grace_ms = late_grace_ms

    def judge(
        self,
        transaction: WriteTransaction,
        notifications: Sequence[Notification],
        own_tries: frozenset[tuple[int, int]] = frozenset(),
    ) -> GroupResult:
        """Decide and write a group. The index must be between ``begin`` and ``commit``.

        own_tries: the (writer_no, group_no) of earlier tries of this very group whose commit was not
        answered; what they wrote is this group's own and no replay.
        """
        orders = [parse_channel_order_no(notification.channel_order_no) for notification in notifications]
        self._load_missing(transaction, orders)
        verdicts: list[Verdict | None] = [None] * len(notifications)
        lost = self._accept_fast(transaction, notifications, orders, verdicts)
        rare = [
            RareItem(position, notification, order)
            for position, (notification, order) in enumerate(zip(notifications, orders, strict=True))
            if verdicts[position] is None or (order is not None and order.payment_id in lost)
        ]
        failpoint("judge.outcomes_inserted")
        refunds = self._judge_rare(transaction, rare, verdicts, own_tries)
        answered = [verdict for verdict in verdicts if verdict is not None]
        assert len(answered) == len(notifications), "every notification is answered"
        return GroupResult(answered, refunds)

    def _load_missing(self, transaction: WriteTransaction, orders: Iterable[ChannelOrderNo | None]) -> None:
        missing = {order.payment_id for order in orders if order is not None and order.payment_id not in self._index}
        if missing:
            for record in transaction.load_records(missing).values():
                index_payment(self._index, record, self._accounts)

    def _accept_fast(
        self,
        transaction: WriteTransaction,
        notifications: Sequence[Notification],
        orders: Sequence[ChannelOrderNo | None],
        verdicts: list[Verdict | None],
    ) -> set[int]:
        """Try for the outcome of each payment that the index holds for open and in time; return those that lost.

        One with excess loses too: another process may have judged this very capture, which is then no first one, and a
        refund may wait for the outcome.
        """
        outcomes = []
        for position, (notification, order) in enumerate(zip(notifications, orders, strict=True)):
            if order is None or notification.result != ChannelResult.SUCCESS:
                continue
            if notification.source != CaptureSource.NOTIFICATION:
                # The fast insert writes this one source for all its rows.
                continue
            packed = self._check(notification, order)
            if packed & _OUTCOME_MASK != _ACCEPTED or packed & _ASK:
                continue
            self._index.accept(order.payment_id, order.attempt)
            verdicts[position] = verdict = _verdict(packed, order)
            outcomes.append(paid_outcome(notification, order, verdict, transaction.stamp))
        return transaction.insert_first_outcomes(PlainOutcomes(outcomes)) if outcomes else set()

    def _check(self, notification: Notification, order: ChannelOrderNo) -> int:
        return self._index.check(
            order.payment_id,
            order.attempt,
            self._accounts(notification.channel, notification.account),
            notification.amount_minor,
            CURRENCY_CODES.get(notification.currency, 0),
            notification.paid_at_ms,
            notification.received_at_ms,
        )

    def _judge_rare(
        self,
        transaction: WriteTransaction,
        items: list["RareItem"],
        verdicts: list[Verdict | None],
        own_tries: frozenset[tuple[int, int]],
    ) -> list[RefundIntent]:
        refunds: list[RefundIntent] = []
        while items:
            records = transaction.lock_records(item.order.payment_id for item in items if item.order)
            plan = RarePlan(records, transaction.stamp, self._late_grace_ms, own_tries)
            for item in items:
                plan.add(item)
            lost = transaction.insert_outcomes(plan.outcomes) if plan.outcomes else set()
            if waiting := plan.waiting():
                lost |= transaction.hold_open(waiting)
            refunds += plan.write(transaction, lost)
            for position, verdict in plan.verdicts:
                verdicts[position] = verdict
            for payment_id, record in records.items():
                if payment_id not in lost:
                    index_payment(self._index, record, self._accounts)
            # A payment that lost has an outcome now, so it cannot lose again: this ends after two rounds.
            items = [item for item in items if item.order and item.order.payment_id in lost]
        return refunds


class RareItem(NamedTuple):
    """A notification that the index could not answer, with its place in the group."""

    position: int
    notification: Notification
    order: ChannelOrderNo | None


class RarePlan:
    """What a round of the rare path is going to write. Records change as it is made, so the next is judged on it."""

    def __init__(
        self,
        records: dict[int, PaymentRecord],
        stamp: Stamp,
        late_grace_ms: int,
        own_tries: frozenset[tuple[int, int]],
    ) -> None:
        self._records = records
        self._stamp = stamp
        self._late_grace_ms = late_grace_ms
        self._own_tries = own_tries
        self._own_seen: set[tuple[int, int, str]] = set()
        self.verdicts: list[tuple[int, Verdict]] = []
        self.outcomes: list[OutcomeRow] = []
        self._excess: list[ExcessRow] = []
        self._failures: list[FailureNote] = []
        self._quarantine: dict[str, QuarantineRow] = {}

    def add(self, item: RareItem) -> None:
        """Judge one notification and plan what it writes."""
        position, notification, order = item
        record = self._records.get(order.payment_id) if order else None
        attempt = record.attempts.get(order.attempt) if record and order else None
        if notification.result == ChannelResult.FAILURE:
            packed = self._judge_failure(notification, attempt)
        else:
            packed = self._judge_success(notification, order, record, attempt)
        outcome = NotifyOutcome(packed & _OUTCOME_MASK)
        if outcome in QUARANTINE_REASONS and not packed & VerdictFlag.REPLAYED:
            self._put_quarantine(notification, order, outcome)
        self.verdicts.append((position, _verdict(packed, order if attempt else None)))

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
        evidence = [row for row in self._quarantine.values() if row.payment_id not in lost]
        if evidence:
            transaction.put_quarantine(evidence, maybe_counted=bool(self._own_tries))
        self.verdicts = [(position, verdict) for position, verdict in self.verdicts if verdict.payment_id not in lost]
        return intents

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

    def _put_quarantine(self, notification: Notification, order: ChannelOrderNo | None, reason: NotifyOutcome) -> None:
        row = _quarantine_row(notification, order, reason, self._stamp)
        known = self._quarantine.get(row.quarantine_id)
        if known is not None:
            row = known._replace(last_seen_at_ms=row.last_seen_at_ms, arrivals=known.arrivals + 1)
        self._quarantine[row.quarantine_id] = row


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
        other_live=any(row.attempt != attempt.attempt for row in record.live_attempts()),
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
