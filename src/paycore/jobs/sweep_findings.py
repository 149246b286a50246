"""Tells what is missing on a payment, from everything on record about it. The same rows give the same findings."""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.domain.ids import MAX_REFUND_TRIES
from paycore.domain.sweep import SweepKind
from paycore.domain.verdicts import PaymentState, RefundState, TaskKind
from paycore.jobs.sweep_contradictions import (
    Contradiction,
    contradiction,
    contradictions,
    is_number_taken,
    is_of_merchant,
    is_of_terms,
    refunds_of,
)
from paycore.store.rows import ChannelOrderRow, ExcessRow, RefundRow
from paycore.store.sweeps import SweepCase

UNJUDGED_AFTER_MS = 60_000
"""How long the channel's word that an attempt is paid may be on record before what it said of money is judged."""


class Moment(NamedTuple):
    """When a payment is looked at. attempts_after_ms: attempts that expire later are expected to be asked about."""

    now_ms: int
    late_grace_ms: int
    attempts_after_ms: int


class Owed(NamedTuple):
    """A capture that is to go back, and has no refund."""

    kind: SweepKind
    excess: ExcessRow


class Untried(NamedTuple):
    """A refund whose next try, ``seq``, is missing."""

    kind: SweepKind
    refund: RefundRow
    seq: int


class Untasked(NamedTuple):
    """A payment, or one of its attempts, that nobody is going to come back to."""

    kind: SweepKind
    attempt: ChannelOrderRow | None


class Unjudged(NamedTuple):
    """An attempt that the channel called paid, without anything that came of it by ``due_at_ms``."""

    kind: SweepKind
    attempt: ChannelOrderRow
    due_at_ms: int


Finding = Owed | Untried | Untasked | Unjudged | Contradiction


def find(case: SweepCase, moment: Moment) -> list[Finding]:
    """Return what is missing or wrong. Nothing is owed while a payment has no outcome (R2)."""
    told = list(contradictions(case))
    untried = _of_refunds(case, {one.reference for one in told})
    return [*told, *_of_excess(case), *untried, *_of_tasks(case, moment), *_of_queried(case, moment)]


def waits(case: SweepCase) -> bool:
    """Whether a payment has to be looked at again: what is to come will leave no trace that is read by itself."""
    return (bool(case.record.excess) and case.record.outcome is None) or any(
        attempt in case.record.attempts for attempt, _ in _unjudged(case)
    )


def _of_excess(case: SweepCase) -> Iterator[Finding]:
    if case.record.outcome is None:
        return
    kind = SweepKind.SEVERAL_CAPTURES if case.record.state == PaymentState.PAID else SweepKind.CLOSED_WITH_CAPTURE
    for row in case.record.excess:
        is_kept = case.record.is_kept(row.attempt, row.channel_trade_no)
        if not is_kept and not refunds_of(case, row) and not is_number_taken(case, row):
            yield Owed(kind, row)


def _of_refunds(case: SweepCase, doubtful: set[str]) -> Iterator[Finding]:
    """Find what is to be sent. doubtful: refunds that something is wrong with are left as they are."""
    for refund in case.refunds:
        if refund.refund_no not in doubtful and (is_of_merchant(refund) or _is_sound(case, refund)):
            yield from _of_tries(case, refund)


def _is_sound(case: SweepCase, refund: RefundRow) -> bool:
    """Whether a refund is the only one of an excess, and of what was captured."""
    capture = (refund.attempt, refund.channel_trade_no)
    of_capture = [row for row in case.record.excess if (row.attempt, row.channel_trade_no) == capture]
    return any(refunds_of(case, row) == [refund] and is_of_terms(refund, row) for row in of_capture)


def _of_tries(case: SweepCase, refund: RefundRow) -> Iterator[Finding]:
    tried = {row.seq for row in case.tries if row.refund_no == refund.refund_no}
    results = {row.seq: row.result for row in case.results if row.refund_no == refund.refund_no}
    if not tried and not results:
        yield Untried(SweepKind.REFUND_WITHOUT_TRY, refund, 1)
        return
    last = max(tried, default=0)
    # After any other final word money went back already, and without one about the last try it may be on its way (R6).
    if set(results.values()) == {RefundState.REFUSED} and max(results) == last < MAX_REFUND_TRIES:
        yield Untried(SweepKind.REFUND_STUCK, refund, last + 1)


def _of_tasks(case: SweepCase, moment: Moment) -> Iterator[Finding]:
    record = case.record
    if record.outcome is None and (TaskKind.CLOSE, 0) not in case.tasks:
        expired = record.payment.expire_at_ms + moment.late_grace_ms < moment.now_ms
        waiting = bool(record.excess) and expired
        yield Untasked(SweepKind.EXPIRED_WITH_EXCESS if waiting else SweepKind.PAYMENT_WITHOUT_TASK, None)
    for row in record.live_attempts():
        if row.expire_at_ms > moment.attempts_after_ms and (TaskKind.QUERY, row.attempt) not in case.tasks:
            yield Untasked(SweepKind.PAYMENT_WITHOUT_TASK, row)


def _of_queried(case: SweepCase, moment: Moment) -> Iterator[Finding]:
    for attempt, at_ms in _unjudged(case):
        row = case.record.attempts.get(attempt)
        if row is None:
            yield contradiction("the channel called an attempt paid that there is not", attempt, "")
        elif at_ms + UNJUDGED_AFTER_MS <= moment.now_ms:
            yield Unjudged(SweepKind.PAID_AT_CHANNEL, row, at_ms + UNJUDGED_AFTER_MS)


def _unjudged(case: SweepCase) -> Iterator[tuple[int, int]]:
    accounted = case.record.captured_attempts() | case.evidence
    return (one for one in case.queried if one[0] not in accounted)
