"""Tells what is missing on a payment, from everything on record about it. The same rows give the same findings."""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.domain.ids import MAX_REFUND_TRIES, excess_refund_no
from paycore.domain.sweep import SweepKind
from paycore.domain.verdicts import PaymentState, RefundState, TaskKind
from paycore.store.rows import ChannelOrderRow, ExcessRow, RefundRow
from paycore.store.sweeps import SweepCase

UNJUDGED_AFTER_MS = 60_000
"""How long the channel's word that an attempt is paid may be on record before what it said of money is judged."""

_EXCESS_NUMBER = "X"


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


class Contradiction(NamedTuple):
    """Rows that only a person can put right."""

    kind: SweepKind
    what: str
    attempt: int
    reference: str
    """A trade number or a refund's number."""


Finding = Owed | Untried | Untasked | Unjudged | Contradiction


def find(case: SweepCase, moment: Moment) -> list[Finding]:
    """Return what is missing or wrong. Nothing is owed while a payment has no outcome (R2)."""
    return [*_of_excess(case), *_of_refunds(case), *_of_tasks(case, moment), *_of_queried(case, moment)]


def waits(case: SweepCase) -> bool:
    """Whether a payment has to be looked at again: what is to come will leave no trace that is read by itself."""
    return (bool(case.record.excess) and case.record.outcome is None) or any(
        attempt in case.record.attempts for attempt, _ in _unjudged(case)
    )


def _of_excess(case: SweepCase) -> Iterator[Finding]:
    kind = SweepKind.SEVERAL_CAPTURES if case.record.state == PaymentState.PAID else SweepKind.CLOSED_WITH_CAPTURE
    for row in case.record.excess:
        if case.record.is_kept(row.attempt, row.channel_trade_no):
            yield _contradiction("the kept capture is excess too", row.attempt, row.channel_trade_no)
        elif case.record.outcome is not None:
            yield from _of_surplus(case, row, kind)


def _of_surplus(case: SweepCase, row: ExcessRow, kind: SweepKind) -> Iterator[Finding]:
    capture = (row.attempt, row.channel_trade_no)
    refunds = _refunds_of(case, row)
    if not refunds:
        number = excess_refund_no(*capture)
        if any(one.refund_no == number for one in case.refunds):
            yield _contradiction("its refund names another capture", *capture)
        else:
            yield Owed(kind, row)
    elif len(refunds) > 1:
        yield _contradiction("it has several refunds", *capture)
    elif not _is_of_terms(refunds[0], row):
        yield _contradiction("its refund is of another amount", *capture)


def _of_refunds(case: SweepCase) -> Iterator[Finding]:
    excess = {(row.attempt, row.channel_trade_no): row for row in case.record.excess}
    for refund in case.refunds:
        capture = (refund.attempt, refund.channel_trade_no)
        if not refund.refund_no.startswith(_EXCESS_NUMBER):
            yield from _of_tries(case, refund)
        elif case.record.outcome is None:
            yield _contradiction("refunded before there is an outcome", refund.attempt, refund.refund_no)
        elif case.record.is_kept(*capture):
            yield _contradiction("the kept capture has a refund", refund.attempt, refund.refund_no)
        elif capture not in excess:
            yield _contradiction("a refund of what is no capture", refund.attempt, refund.refund_no)
        elif [refund] == _refunds_of(case, excess[capture]) and _is_of_terms(refund, excess[capture]):
            yield from _of_tries(case, refund)


def _refunds_of(case: SweepCase, row: ExcessRow) -> list[RefundRow]:
    capture = (row.attempt, row.channel_trade_no)
    return [one for one in case.refunds if (one.attempt, one.channel_trade_no) == capture]


def _is_of_terms(refund: RefundRow, row: ExcessRow) -> bool:
    return (refund.amount_minor, refund.currency) == (row.amount_minor, row.currency)


def _of_tries(case: SweepCase, refund: RefundRow) -> Iterator[Finding]:
    tried = {row.seq for row in case.tries if row.refund_no == refund.refund_no}
    results = {row.seq: row.result for row in case.results if row.refund_no == refund.refund_no}
    if not tried and not results:
        yield Untried(SweepKind.REFUND_WITHOUT_TRY, refund, 1)
        return
    last = max(tried, default=0)
    # After any other final word money went back already, and without one about the last try it may be on its way (R6).
    if set(results.values()) != {RefundState.REFUSED} or max(results) != last:
        return
    if last < MAX_REFUND_TRIES:
        yield Untried(SweepKind.REFUND_STUCK, refund, last + 1)
    else:
        yield _contradiction("every try was refused", refund.attempt, refund.refund_no)


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
            yield _contradiction("the channel called an attempt paid that there is not", attempt, "")
        elif at_ms + UNJUDGED_AFTER_MS <= moment.now_ms:
            yield Unjudged(SweepKind.PAID_AT_CHANNEL, row, at_ms + UNJUDGED_AFTER_MS)


def _unjudged(case: SweepCase) -> Iterator[tuple[int, int]]:
    accounted = case.record.captured_attempts() | case.evidence
    return (one for one in case.queried if one[0] not in accounted)


def _contradiction(what: str, attempt: int, reference: str) -> Contradiction:
    return Contradiction(SweepKind.CONTRADICTION, what, attempt, reference)
