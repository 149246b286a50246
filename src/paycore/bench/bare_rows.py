"""The rows that the bare store writes: those of the accepted path."""

from collections.abc import Iterator

from paycore.bench.payments import CURRENCY, Lot, amount_minor, trade_no
from paycore.domain.verdicts import CaptureSource, PaymentState
from paycore.store import tables
from paycore.store.rows import OutcomeRow

COLUMNS = ", ".join(column.name for column in tables.payment_outcome.columns)

OF_ROW = (0, 2, 3, 4, 5, 6, 7, 9)
"""Which columns of a row a statement is handed; the others are the same for all of a group."""


def outcomes(lot: Lot) -> Iterator[OutcomeRow]:
    """What the server writes for the first word about each payment."""
    at_ms = lot.end_ms + 1_000
    for payment_id in lot.ids():
        yield OutcomeRow(
            payment_id=payment_id,
            state=PaymentState.PAID,
            attempt=1,
            channel_trade_no=trade_no(payment_id, 1),
            amount_minor=amount_minor(payment_id),
            currency=CURRENCY,
            paid_at_ms=at_ms,
            received_at_ms=at_ms,
            source=CaptureSource.NOTIFICATION,
            paid_at_untrusted=0,
            close_reason=0,
            recorded_at_ms=at_ms,
            writer_no=lot.node,
            group_no=1,
        )


def groups(rows: list[OutcomeRow], size: int) -> Iterator[list[OutcomeRow]]:
    """The rows of each commit."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
