"""The blocking client. Safe to share between threads. It batches nothing by itself: ``BatchingNotifier`` does."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc

from paycore.client import requests
from paycore.client.answers import WordAnswer, read_answers
from paycore.client.errors import read_error
from paycore.client.retrying import Attempts, RetryPolicy, draw
from paycore.v1 import payment_pb2, payment_service_pb2
from paycore.v1.payment_service_pb2_grpc import PaymentServiceStub

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class PaycoreClient:
    """Calls one paycore server: ``with PaycoreClient("127.0.0.1:50051") as client: client.query(payment_id=1)``.

    timeout_ms: the deadline of a call that names none of its own. retry: calls that meet UNAVAILABLE, a server that is
    not up yet among them, are made again until their deadline; NO_RETRY makes each once. Whoever makes a client closes
    it. Every call raises PaycoreRpcError when it is refused or not answered, and ValueError for values that no request
    can hold.
    """

    def __init__(
        self, address: str, *, timeout_ms: int = requests.DEFAULT_TIMEOUT_MS, retry: RetryPolicy | None = None
    ) -> None:
        self._timeout_ms = timeout_ms
        self._retry = retry or RetryPolicy()
        self._channel = grpc.insecure_channel(address, options=requests.CHANNEL_OPTIONS)
        self._stub = PaymentServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self._channel.close()

    def pay(
        self,
        *,
        merchant_id: str,
        merchant_order_no: str,
        amount_minor: int,
        currency: str,
        subject: str,
        channel: str,
        account: str,
        method: payment_pb2.PayMethod.ValueType,
        return_url: str = "",
        validity_ms: int | None = None,
        timeout_ms: int | None = None,
    ) -> payment_service_pb2.PayResponse:
        """Ask for one payment of one merchant order. Idempotent: the same call again returns the same payment.

        method: a PAY_METHOD_ constant of ``paycore.v1.payment_pb2``. validity_ms: None for the server's default.
        """
        request = requests.pay_request(
            merchant_id=merchant_id,
            merchant_order_no=merchant_order_no,
            amount_minor=amount_minor,
            currency=currency,
            subject=subject,
            channel=channel,
            account=account,
            method=method,
            return_url=return_url,
            validity_ms=validity_ms,
        )
        return self._call(self._stub.Pay, request, timeout_ms)

    def notify(
        self,
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
        timeout_ms: int | None = None,
    ) -> payment_service_pb2.NotifyResponse:
        """Hand over what a channel said. Acknowledge it to the channel only when this returns.

        result: a CHANNEL_RESULT_ constant of ``paycore.v1.payment_pb2``. paid_at_ms: None when the channel gave none.
        After a retry ``replayed`` may be true of the caller's own word: the first try was kept, its answer lost.
        """
        request = requests.notify_request(
            channel=channel,
            account=account,
            channel_order_no=channel_order_no,
            result=result,
            amount_minor=amount_minor,
            currency=currency,
            channel_trade_no=channel_trade_no,
            paid_at_ms=paid_at_ms,
            raw=raw,
            headers=headers,
        )
        return self._call(self._stub.Notify, request, timeout_ms)

    def notify_batch(
        self, notifications: Sequence[payment_service_pb2.NotifyRequest], *, timeout_ms: int | None = None
    ) -> list[WordAnswer]:
        """Hand over 1 to 10,000 words in one call; return each one's answer, in their order. It is not atomic.

        notifications: made by ``paycore.client.notify_request``. A word that is INVALID or THROTTLED has its error as
        its answer, the one that ``notify`` would raise; it is not raised. Raises PaycoreRpcError where the call failed
        as a whole: then no word is answered for, and the same batch may be sent again.
        """
        response = self._call(self._stub.NotifyBatch, requests.batch_request(notifications), timeout_ms)
        return read_answers(response, len(notifications))

    def query(
        self,
        *,
        payment_id: int | None = None,
        merchant_id: str | None = None,
        merchant_order_no: str | None = None,
        channel_order_no: str | None = None,
        timeout_ms: int | None = None,
    ) -> payment_pb2.Payment:
        """Read everything on record about one payment, named by one key: id, merchant order, or channel order."""
        request = requests.query_request(
            payment_id=payment_id,
            merchant_id=merchant_id,
            merchant_order_no=merchant_order_no,
            channel_order_no=channel_order_no,
        )
        return self._call(self._stub.Query, request, timeout_ms).payment

    def refresh(
        self,
        *,
        payment_id: int | None = None,
        merchant_id: str | None = None,
        merchant_order_no: str | None = None,
        channel_order_no: str | None = None,
        timeout_ms: int | None = None,
    ) -> payment_service_pb2.QueryResponse:
        """Read a payment as ``query`` does, after its channels were asked about each attempt without a final word.

        The answer names the attempts about which a channel said nothing in time, in ``unanswered_attempts``; what is on
        record is in ``payment`` all the same.
        """
        request = requests.query_request(
            payment_id=payment_id,
            merchant_id=merchant_id,
            merchant_order_no=merchant_order_no,
            channel_order_no=channel_order_no,
            refresh=True,
        )
        return self._call(self._stub.Query, request, timeout_ms)

    def close(
        self,
        *,
        payment_id: int | None = None,
        merchant_id: str | None = None,
        merchant_order_no: str | None = None,
        timeout_ms: int | None = None,
    ) -> payment_pb2.Payment:
        """Close an unpaid payment, named by one key: id or merchant order. A closed one is returned again."""
        request = requests.close_request(
            payment_id=payment_id, merchant_id=merchant_id, merchant_order_no=merchant_order_no
        )
        return self._call(self._stub.Close, request, timeout_ms).payment

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[_Request, _Response], request: _Request, timeout_ms: int | None
    ) -> _Response:
        now_ms = requests.milliseconds_now
        attempts = Attempts(self._retry, now_ms() + (timeout_ms or self._timeout_ms), draw)
        while True:
            try:
                return method(request, timeout=attempts.left_ms(now_ms()) / 1_000)
            except grpc.RpcError as raised:
                # What the blocking API raises is the call itself, which its types do not say.
                call = cast(grpc.Call, raised)
                error = read_error(call.code(), call.details(), call.trailing_metadata())
            wait_ms = attempts.wait_ms(error, now_ms())
            if wait_ms is None:
                raise error
            time.sleep(wait_ms / 1_000)
