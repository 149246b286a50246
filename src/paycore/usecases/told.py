"""Money that a channel told of when it was asked: the words that are judged, and what is kept of them before that.

An answer may name several captures of one attempt, of which at most one can be what the payment keeps. The others are
evidence, and it is written with the note that the channel called the attempt paid, before any is judged: once the first
is on record nobody asks about the attempt again. It takes no allowance, since nobody can flood us with what we ask for.
"""

from collections.abc import Iterator, Sequence

from paycore.channels.protocol import Capture
from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import format_channel_order_no
from paycore.domain.notification import Notification, quarantine_id
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, Recorded
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import ChannelOrderRow, PaymentRecord, QuarantineRow, Stamp
from paycore.usecases.rare import compare_capture
from paycore.usecases.writer import UnindexedUnit


def words_of(
    attempt: ChannelOrderRow, captures: Sequence[Capture], source: CaptureSource, now_ms: int
) -> list[Notification]:
    """Return captures as words, as if the channel had sent them."""
    return [
        Notification(
            attempt.channel,
            attempt.account,
            format_channel_order_no(attempt.payment_id, attempt.attempt),
            ChannelResult.SUCCESS,
            capture.amount_minor,
            capture.currency,
            capture.channel_trade_no,
            ABSENT_MS if capture.paid_at_ms is None else capture.paid_at_ms,
            now_ms,
            source,
        )
        for capture in captures
    ]


class NoteQueriedPaid(UnindexedUnit):
    """A write unit: the channel said, when asked, that an attempt is paid.

    Written before its captures are judged: whoever looks later can tell money that was heard of and not taken in.
    words: its captures, all of which are going to be judged.
    """

    def __init__(self, attempt: ChannelOrderRow, words: Sequence[Notification] = ()) -> None:
        self._payment_id, self._attempt = attempt.payment_id, attempt.attempt
        self._words = words

    def apply(self, transaction: WriteTransaction) -> bool:
        """Return whether it was news."""
        record = transaction.lock_records([self._payment_id])[self._payment_id]
        rows = [
            self._row(word, reason, transaction.stamp)
            for word, reason in evidence_of(record, self._attempt, self._words)
        ]
        there = transaction.evidence_on_record({row.quarantine_id for row in rows}) if rows else {}
        fresh = {row.quarantine_id: row for row in rows if row.quarantine_id not in there}
        if fresh:
            transaction.put_quarantine(list(fresh.values()))
        return transaction.note_queried_paid(self._payment_id, self._attempt)

    def _row(self, word: Notification, reason: NotifyOutcome, stamp: Stamp) -> QuarantineRow:
        return QuarantineRow(
            quarantine_id(word, reason),
            reason,
            self._payment_id,
            self._attempt,
            word.result,
            word.channel,
            word.account,
            word.channel_order_no,
            word.channel_trade_no,
            word.amount_minor,
            word.currency,
            None if word.paid_at_ms == ABSENT_MS else word.paid_at_ms,
            word.source,
            word.raw,
            word.headers,
            word.received_at_ms,
            word.received_at_ms,
            # Its arrival is counted when it is judged.
            0,
            1,
            "[]",
            *stamp,
        )


def evidence_of(
    record: PaymentRecord, attempt: int, words: Sequence[Notification]
) -> Iterator[tuple[Notification, NotifyOutcome]]:
    """Find the words of one answer that cannot be what their payment keeps, each with what it will be judged.

    What was asked for comes first, wherever it stands in the answer.
    """
    asked = (record.payment.amount_minor, record.payment.currency)
    first: Notification | None = None
    for word in sorted(words, key=lambda word: (word.amount_minor, word.currency) != asked):
        recorded, _ = compare_capture(record, attempt, word)
        if recorded == Recorded.OTHER_TERMS:
            yield word, NotifyOutcome.MISMATCH
        elif recorded == Recorded.OTHER_TRADE:
            yield word, NotifyOutcome.SECOND_CAPTURE
        elif recorded == Recorded.NONE:
            if first is not None and word.channel_trade_no != first.channel_trade_no:
                yield word, NotifyOutcome.SECOND_CAPTURE
            elif (word.amount_minor, word.currency) != asked:
                yield word, NotifyOutcome.MISMATCH
            else:
                first = word
