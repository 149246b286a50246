"""The rows that use cases answer with, by name, for handlers that must not know the store."""

from paycore.store.rows import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentFile,
    PaymentRow,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
)

__all__ = [
    "ChannelOrderRow",
    "ExcessRow",
    "OutcomeRow",
    "PaymentFile",
    "PaymentRow",
    "QuarantineRow",
    "RefundResultRow",
    "RefundRow",
    "RefundTryRow",
]
