"""What Pay leaves behind for repair to come back to, and when: written in one transaction with what it is about."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from paycore.channels.protocol import ChannelTraits
from paycore.domain.ids import slice_of
from paycore.domain.verdicts import TaskKind
from paycore.store.rows import ChannelOrderRow, PaymentRow, Stamp, TaskRow
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS


class Schedule(NamedTuple):
    """When repair looks at a payment and its attempts. traits: how each channel wants to be treated."""

    traits: Callable[[str], ChannelTraits]
    late_grace_ms: int

    def close_at_ms(self, payment: PaymentRow) -> int:
        """When a payment that nobody paid may be closed: from here on a payment in time has been made already."""
        return payment.expire_at_ms + self.late_grace_ms + 1

    def last_look_at_ms(self, attempt: ChannelOrderRow) -> int:
        """When a channel is asked about an attempt for the last time: even "not known here" is a final word by then."""
        return attempt.expire_at_ms + self.late_grace_ms + NOT_EXIST_MARGIN_MS + 1

    def end_at_ms(self, attempt: ChannelOrderRow) -> int:
        """When an attempt may be closed at its channel at the earliest."""
        return attempt.recorded_at_ms + self.traits(attempt.channel).min_close_age_ms

    def next_look_at_ms(self, attempt: ChannelOrderRow, now_ms: int) -> int:
        """When a channel is asked about an attempt next: on the next rung of its ladder, else for the last time.

        The rungs are waits, each after the one before, from when the attempt was opened. Those that were missed,
        because the channel was silent or no job ran, are left out.
        """
        last_at_ms = self.last_look_at_ms(attempt)
        for age_ms in itertools.accumulate(self.traits(attempt.channel).query_ladder_ms):
            if attempt.recorded_at_ms + age_ms > now_ms:
                return min(attempt.recorded_at_ms + age_ms, last_at_ms)
        return last_at_ms

    def to_close(self, payment: PaymentRow, stamp: Stamp) -> TaskRow:
        """The task to close a payment, should nobody have paid it."""
        return _task(payment.payment_id, TaskKind.CLOSE, 0, self.close_at_ms(payment), stamp)

    def to_query(self, attempt: ChannelOrderRow, stamp: Stamp) -> TaskRow:
        """The task to ask about an attempt, should no word of it have come."""
        first_at_ms = self.next_look_at_ms(attempt, stamp.recorded_at_ms)
        return _task(attempt.payment_id, TaskKind.QUERY, attempt.attempt, first_at_ms, stamp)

    def to_end(self, attempt: ChannelOrderRow, stamp: Stamp) -> TaskRow:
        """The task to end an attempt that a younger one takes the place of."""
        next_at_ms = max(stamp.recorded_at_ms, self.end_at_ms(attempt))
        return _task(attempt.payment_id, TaskKind.END, attempt.attempt, next_at_ms, stamp)


def _task(payment_id: int, kind: TaskKind, attempt: int, next_at_ms: int, stamp: Stamp) -> TaskRow:
    return TaskRow(payment_id, kind, attempt, slice_of(payment_id), next_at_ms, 0, stamp.recorded_at_ms, "", *stamp)
