"""Messages to values and back. Pure: no clock, no I/O, and no rule about money."""

from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from paycore.domain.errors import FieldViolation, InvalidArgumentError
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import PayMethod, RefundState
from paycore.usecases.answers import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentFile,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
)
from paycore.v1 import payment_pb2 as v1

_MAX_DURATION_SECONDS = 315_576_000_000
_MAX_NANOS = 999_999_999
_NANOS_PER_MS = 1_000_000


def timestamp_of(at_ms: int | None) -> Timestamp | None:
    """Write milliseconds as a Timestamp; None stays absent."""
    if at_ms is None:
        return None
    return Timestamp(seconds=at_ms // 1_000, nanos=at_ms % 1_000 * _NANOS_PER_MS)


def duration_ms(duration: Duration, field: str) -> int:
    """Read a Duration as milliseconds, rounded towards zero. Raises InvalidArgumentError where it is not valid."""
    seconds, nanos = duration.seconds, duration.nanos
    signs_differ = (seconds > 0 > nanos) or (seconds < 0 < nanos)
    if abs(seconds) > _MAX_DURATION_SECONDS or abs(nanos) > _MAX_NANOS or signs_differ:
        rule = "must be a valid Duration: seconds and nanos of one sign and in range"
        raise InvalidArgumentError([FieldViolation(field, rule)])
    absolute_ms = abs(seconds) * 1_000 + abs(nanos) // _NANOS_PER_MS
    return -absolute_ms if seconds < 0 or nanos < 0 else absolute_ms


def attempt_message(row: ChannelOrderRow) -> v1.Attempt:
    """Write an attempt; its credential is a URL or a QR text by method, and neither for a charge."""
    return v1.Attempt(
        attempt=row.attempt,
        channel_order_no=format_channel_order_no(row.payment_id, row.attempt),
        channel=row.channel,
        account=row.account,
        method=v1.PayMethod.ValueType(row.method),
        state=v1.AttemptState.ValueType(row.state),
        pay_url=row.credential if row.method == PayMethod.REDIRECT else "",
        qr_text=row.credential if row.method == PayMethod.QR else "",
        expire_at=timestamp_of(row.expire_at_ms),
        failure_code=row.failure_code,
        failure_message=row.failure_message,
        created_at=timestamp_of(row.recorded_at_ms),
    )


def payment_message(file: PaymentFile) -> v1.Payment:
    """Write everything on record about a payment."""
    record, payment = file.record, file.record.payment
    return v1.Payment(
        payment_id=payment.payment_id,
        merchant_id=payment.merchant_id,
        merchant_order_no=payment.merchant_order_no,
        amount_minor=payment.amount_minor,
        currency=payment.currency,
        subject=payment.subject,
        return_url=payment.return_url,
        expire_at=timestamp_of(payment.expire_at_ms),
        created_at=timestamp_of(payment.recorded_at_ms),
        state=v1.PaymentState.ValueType(record.state),
        outcome=None if record.outcome is None else _outcome_message(record.outcome),
        attempts=[attempt_message(row) for _, row in sorted(record.attempts.items())],
        excess=[_excess_message(row) for row in record.excess],
        refunds=[_refund_message(row, file) for row in file.refunds],
        quarantine=[_quarantine_message(row) for row in file.quarantine],
        quarantine_total=file.quarantine_total,
    )


def _outcome_message(row: OutcomeRow) -> v1.PaymentOutcome:
    return v1.PaymentOutcome(
        state=v1.PaymentState.ValueType(row.state),
        attempt=row.attempt,
        channel_trade_no=row.channel_trade_no,
        amount_minor=row.amount_minor,
        currency=row.currency,
        paid_at=timestamp_of(row.paid_at_ms),
        paid_at_untrusted=bool(row.paid_at_untrusted),
        source=v1.CaptureSource.ValueType(row.source),
        close_reason=v1.CloseReason.ValueType(row.close_reason),
        recorded_at=timestamp_of(row.recorded_at_ms),
    )


def _excess_message(row: ExcessRow) -> v1.ExcessPayment:
    return v1.ExcessPayment(
        attempt=row.attempt,
        channel_trade_no=row.channel_trade_no,
        reason=v1.NotifyOutcome.ValueType(row.reason),
        amount_minor=row.amount_minor,
        currency=row.currency,
        paid_at=timestamp_of(row.paid_at_ms),
        source=v1.CaptureSource.ValueType(row.source),
        recorded_at=timestamp_of(row.recorded_at_ms),
    )


def _refund_message(row: RefundRow, file: PaymentFile) -> v1.Refund:
    tries = [one for one in file.refund_tries if one.refund_no == row.refund_no]
    results = {one.seq: one for one in file.refund_results if one.refund_no == row.refund_no}
    last = max(tries, key=lambda one: one.seq, default=None)
    final = results.get(last.seq) if last is not None else None
    return v1.Refund(
        refund_no=row.refund_no,
        attempt=row.attempt,
        channel_trade_no=row.channel_trade_no,
        amount_minor=row.amount_minor,
        currency=row.currency,
        reason=v1.NotifyOutcome.ValueType(row.reason),
        state=v1.RefundState.ValueType(_refund_state(last, final)),
        channel_refund_no=last.channel_refund_no if last is not None else "",
        tries=len(tries),
        last_error=_last_error(last, results),
        recorded_at=timestamp_of(row.recorded_at_ms),
        finished_at=timestamp_of(final.recorded_at_ms if final is not None else None),
    )


def _refund_state(last: RefundTryRow | None, final: RefundResultRow | None) -> RefundState:
    """The final word where there is one, else the last try's progress; an intent without a try is still to be sent."""
    if final is not None:
        return RefundState(final.result)
    return RefundState(last.state) if last is not None else RefundState.PENDING


def _last_error(last: RefundTryRow | None, results: Mapping[int, RefundResultRow]) -> str:
    """What went wrong in the try that runs, else in the last one that was refused; empty once the money went back."""
    if last is None or RefundState.REFUNDED in {one.result for one in results.values()}:
        return ""
    refusals = [one for _, one in sorted(results.items())]
    if last.seq not in results and last.last_error:
        return last.last_error
    return f"{refusals[-1].code}: {refusals[-1].message}" if refusals else ""


def _quarantine_message(row: QuarantineRow) -> v1.QuarantineEntry:
    return v1.QuarantineEntry(
        quarantine_id=row.quarantine_id,
        reason=v1.NotifyOutcome.ValueType(row.reason),
        channel=row.channel,
        account=row.account,
        channel_order_no=row.channel_order_no,
        result=v1.ChannelResult.ValueType(row.result),
        amount_minor=row.amount_minor,
        currency=row.currency,
        channel_trade_no=row.channel_trade_no,
        paid_at=timestamp_of(row.paid_at_ms),
        first_seen_at=timestamp_of(row.first_seen_at_ms),
        last_seen_at=timestamp_of(row.last_seen_at_ms),
        arrivals=row.arrivals,
        open=bool(row.is_open),
    )
