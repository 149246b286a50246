"""Rows as a hand would write them, each as one statement of straight SQL, for ``tests.support.planting``."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from paycore.domain.ids import excess_refund_no, format_channel_refund_no, slice_of
from paycore.domain.verdicts import CaptureSource, CloseReason, NotifyOutcome, PaymentState, RefundState
from tests.support.books import rows
from tests.support.core import AMOUNT_MINOR

_PLANTED_WRITER = 0
"""No server ever draws this writer number."""

_FAR = 1_000_000
"""Ids of payments that there are not lie so far from those that there are."""

_orphans = itertools.count(1)


class Capture(NamedTuple):
    payment_id: int
    attempt: int
    trade_no: str

    @property
    def refund_no(self) -> str:
        return excess_refund_no(self.attempt, self.trade_no)

    @property
    def where(self) -> str:
        return f"WHERE payment_id = {self.payment_id}"


def excess_of(url: str, payment_id: int) -> Capture:
    return Capture(
        *rows(url, f"SELECT payment_id, attempt, channel_trade_no FROM excess_payment WHERE payment_id = {payment_id}")[
            0
        ]
    )


def kept_of(url: str, payment_id: int) -> Capture:
    return Capture(
        *rows(
            url, f"SELECT payment_id, attempt, channel_trade_no FROM payment_outcome WHERE payment_id = {payment_id}"
        )[0]
    )


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    return str(int(value)) if isinstance(value, int) else f"'{value}'"


def insert(table: str, at_ms: int, **values: object) -> str:
    stamped = {**values, "recorded_at_ms": at_ms, "writer_no": _PLANTED_WRITER, "group_no": 1}
    return f"INSERT INTO {table} ({', '.join(stamped)}) VALUES ({', '.join(map(_literal, stamped.values()))})"


def made_at_ms(url: str, payment_id: int) -> int:
    return int(rows(url, f"SELECT recorded_at_ms FROM payment WHERE payment_id = {payment_id}")[0][0])


def excess_row(capture: Capture, at_ms: int, reason: NotifyOutcome = NotifyOutcome.DUPLICATE) -> str:
    return insert(
        "excess_payment",
        at_ms,
        payment_id=capture.payment_id,
        attempt=capture.attempt,
        channel_trade_no=capture.trade_no,
        reason=reason,
        amount_minor=AMOUNT_MINOR,
        currency="CNY",
        paid_at_ms=at_ms,
        received_at_ms=at_ms,
        source=CaptureSource.NOTIFICATION,
    )


def outcome_row(payment_id: int, at_ms: int) -> str:
    return insert(
        "payment_outcome",
        at_ms,
        payment_id=payment_id,
        state=PaymentState.CLOSED,
        attempt=0,
        channel_trade_no="",
        amount_minor=0,
        currency="",
        paid_at_ms=None,
        received_at_ms=at_ms,
        source=CaptureSource.QUERY,
        paid_at_untrusted=0,
        close_reason=CloseReason.MERCHANT,
    )


def refund_rows(capture: Capture, at_ms: int, refund_no: str = "", amount_minor: int = AMOUNT_MINOR) -> list[str]:
    """A refund and its first try."""
    number = refund_no or capture.refund_no
    refund = insert(
        "refund",
        at_ms,
        payment_id=capture.payment_id,
        refund_no=number,
        attempt=capture.attempt,
        channel_trade_no=capture.trade_no,
        amount_minor=amount_minor,
        currency="CNY",
        reason=NotifyOutcome.DUPLICATE,
    )
    return [refund, try_row(capture.payment_id, number, 1, at_ms)]


def try_row(payment_id: int, refund_no: str, seq: int, at_ms: int, state: RefundState = RefundState.PENDING) -> str:
    return insert(
        "refund_try",
        at_ms,
        payment_id=payment_id,
        refund_no=refund_no,
        seq=seq,
        channel_refund_no=format_channel_refund_no(payment_id, refund_no, seq),
        slice=slice_of(payment_id),
        state=state,
        state_at_ms=at_ms,
        asks=0,
        next_at_ms=at_ms,
        lease_until_ms=0,
        lease_token="",
        last_error="",
    )


def result_rows(capture: Capture, seq: int, at_ms: int, result: RefundState = RefundState.REFUNDED) -> list[str]:
    """The final word about a try, and the try's state with it."""
    word = insert(
        "refund_result",
        at_ms,
        payment_id=capture.payment_id,
        refund_no=capture.refund_no,
        seq=seq,
        result=result,
        code="",
        message="",
    )
    return [f"UPDATE refund_try SET state = {result:d} {capture.where} AND seq = {seq}", word]


def payment_row(payment_id: int, at_ms: int, order_no: str) -> str:
    return insert(
        "payment",
        at_ms,
        payment_id=payment_id,
        merchant_id="shop",
        merchant_order_no=order_no,
        amount_minor=AMOUNT_MINOR,
        currency="CNY",
        subject="Tea",
        return_url="",
        terms_digest="digest",
        expire_at_ms=at_ms + 600_000,
    )


def attempt_row(payment_id: int, attempt: int, at_ms: int) -> str:
    return insert(
        "channel_order",
        at_ms,
        payment_id=payment_id,
        attempt=attempt,
        channel="simbank",
        account="bank_a",
        method=1,
        expire_at_ms=at_ms + 600_000,
        state=2,
        state_at_ms=at_ms,
        credential="",
        failure_code="",
        failure_message="",
        failed_at_ms=None,
        superseded_at_ms=None,
        lease_until_ms=0,
        lease_token="",
    )


def orphan_of(url: str, payment_id: int) -> int:
    """An id beside a payment's that is nobody's."""
    orphan = payment_id + _FAR + next(_orphans)
    while rows(url, f"SELECT 1 FROM payment WHERE payment_id = {orphan}"):
        orphan += 1
    return orphan
