"""Derives what is owed: one refund for each judged capture that a payment with an outcome does not keep (R2)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paycore.domain.ids import excess_refund_no, format_channel_refund_no, slice_of
from paycore.domain.verdicts import RefundState
from paycore.store.rows import ExcessRow, PaymentRecord, RefundRow, RefundTryRow, Stamp


class RefundIntent(NamedTuple):
    """A refund with its first try."""

    refund: RefundRow
    first_try: RefundTryRow


def derive_refunds(record: PaymentRecord, excess: Iterable[ExcessRow], stamp: Stamp) -> list[RefundIntent]:
    """Return the refunds that a payment owes for these captures of its excess.

    None while it has no outcome, and never one for the kept capture. The number comes from the
    capture, so whoever derives it, however often, means the same refund.
    """
    if record.outcome is None:
        return []
    return [_intent(row, stamp) for row in excess if not record.is_kept(row.attempt, row.channel_trade_no)]


def _intent(excess: ExcessRow, stamp: Stamp) -> RefundIntent:
    refund = RefundRow(
        excess.payment_id,
        excess_refund_no(excess.attempt, excess.channel_trade_no),
        excess.attempt,
        excess.channel_trade_no,
        excess.amount_minor,
        excess.currency,
        excess.reason,
        *stamp,
    )
    return RefundIntent(refund, new_try(refund, seq=1, next_at_ms=stamp.recorded_at_ms, stamp=stamp))


def new_try(
    refund: RefundRow, *, seq: int, next_at_ms: int, stamp: Stamp, state: RefundState = RefundState.PENDING
) -> RefundTryRow:
    """Build a try that waits to be sent. state: NEEDS_ATTENTION where a person was told of its refund already."""
    return RefundTryRow(
        refund.payment_id,
        refund.refund_no,
        seq,
        format_channel_refund_no(refund.payment_id, refund.refund_no, seq),
        slice_of(refund.payment_id),
        state,
        stamp.recorded_at_ms,
        0,
        next_at_ms,
        0,
        "",
        "",
        *stamp,
    )


def split_intents(intents: Sequence[RefundIntent]) -> tuple[list[RefundRow], list[RefundTryRow]]:
    """Return the intents as rows of their two tables."""
    return [intent.refund for intent in intents], [intent.first_try for intent in intents]
