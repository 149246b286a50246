"""Builds requests from plain values, once for both clients."""

import time
from collections.abc import Iterable, Mapping

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from paycore.v1 import payment_pb2, payment_service_pb2

DEFAULT_TIMEOUT_MS = 35_000
"""The deadline of a call: a little more than a server gives Pay by default."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A server that comes back is found at once: the default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Despite its name, how long one try to connect may take; a busy server needs more than the waits above.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A connection that died without a word, behind a proxy or a tunnel, is given up 10 s after 30 s of silence, but
    # only while a call waits: a server may take more for a flood and end the connection. A ping that gRPC sent for its
    # own ends before stands in for the keepalive's, and would be waited for a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # 10,000 answers that each name every violation.
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    # paycore listens on loopback; a proxy of the environment would look for it elsewhere.
    ("grpc.enable_http_proxy", 0),
)


def milliseconds_now() -> int:
    """A clock for deadlines, which nobody sets."""
    return time.monotonic_ns() // 1_000_000


def pay_request(
    *,
    merchant_id: str,
    merchant_order_no: str,
    amount_minor: int,
    currency: str,
    subject: str,
    channel: str,
    account: str,
    method: payment_pb2.PayMethod.ValueType,
    return_url: str,
    validity_ms: int | None,
) -> payment_service_pb2.PayRequest:
    """Build a PayRequest. Raises ValueError where a number does not fit its field."""
    return payment_service_pb2.PayRequest(
        merchant_id=merchant_id,
        merchant_order_no=merchant_order_no,
        amount_minor=amount_minor,
        currency=currency,
        subject=subject,
        return_url=return_url,
        validity=None if validity_ms is None else _duration(validity_ms),
        channel=channel,
        account=account,
        method=method,
    )


def notify_request(
    *,
    channel: str,
    account: str,
    channel_order_no: str,
    result: payment_pb2.ChannelResult.ValueType,
    amount_minor: int = 0,
    currency: str = "",
    channel_trade_no: str = "",
    paid_at_ms: int | None = None,
    raw: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> payment_service_pb2.NotifyRequest:
    """Build a NotifyRequest. Raises ValueError where a number does not fit its field.

    result: a CHANNEL_RESULT_ constant of ``paycore.v1.payment_pb2``. paid_at_ms: None when the channel gave none.
    """
    return payment_service_pb2.NotifyRequest(
        channel=channel,
        account=account,
        channel_order_no=channel_order_no,
        result=result,
        amount_minor=amount_minor,
        currency=currency,
        channel_trade_no=channel_trade_no,
        paid_at=None if paid_at_ms is None else _timestamp(paid_at_ms),
        raw=raw,
        headers=headers,
    )


def batch_request(
    notifications: Iterable[payment_service_pb2.NotifyRequest],
) -> payment_service_pb2.NotifyBatchRequest:
    """Build a NotifyBatchRequest."""
    return payment_service_pb2.NotifyBatchRequest(notifications=notifications)


def query_request(
    *,
    payment_id: int | None,
    merchant_id: str | None,
    merchant_order_no: str | None,
    channel_order_no: str | None,
    refresh: bool = False,
) -> payment_service_pb2.QueryRequest:
    """Build a QueryRequest. Raises ValueError unless exactly one key is given."""
    order = _merchant_order(merchant_id, merchant_order_no)
    _require_one(payment_id, order, channel_order_no)
    if payment_id is not None:
        return payment_service_pb2.QueryRequest(payment_id=payment_id, refresh=refresh)
    if channel_order_no is not None:
        return payment_service_pb2.QueryRequest(channel_order_no=channel_order_no, refresh=refresh)
    return payment_service_pb2.QueryRequest(merchant_order=order, refresh=refresh)


def close_request(
    *, payment_id: int | None, merchant_id: str | None, merchant_order_no: str | None
) -> payment_service_pb2.CloseRequest:
    """Build a CloseRequest. Raises ValueError unless exactly one key is given."""
    order = _merchant_order(merchant_id, merchant_order_no)
    _require_one(payment_id, order)
    if payment_id is not None:
        return payment_service_pb2.CloseRequest(payment_id=payment_id)
    return payment_service_pb2.CloseRequest(merchant_order=order)


def _merchant_order(merchant_id: str | None, merchant_order_no: str | None) -> payment_pb2.MerchantOrderKey | None:
    if merchant_id is None and merchant_order_no is None:
        return None
    if merchant_id is None or merchant_order_no is None:
        raise ValueError("merchant_id and merchant_order_no go together")
    return payment_pb2.MerchantOrderKey(merchant_id=merchant_id, merchant_order_no=merchant_order_no)


def _require_one(*keys: object) -> None:
    if sum(key is not None for key in keys) != 1:
        raise ValueError("name the payment by exactly one key")


def _duration(milliseconds: int) -> Duration:
    # Integer division, not Duration.FromMilliseconds: that one refuses what the server should have the say about.
    sign, absolute = (-1 if milliseconds < 0 else 1), abs(milliseconds)
    return Duration(seconds=sign * (absolute // 1_000), nanos=sign * (absolute % 1_000) * 1_000_000)


def _timestamp(at_ms: int) -> Timestamp:
    return Timestamp(seconds=at_ms // 1_000, nanos=at_ms % 1_000 * 1_000_000)
