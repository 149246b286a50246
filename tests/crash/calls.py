"""The clients: they ask again until they are answered, remember every answer, and count who is still waiting."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from paycore.client.errors import PaycoreRpcError, read_error
from paycore.client.requests import notify_request, pay_request
from paycore.domain.ids import format_channel_order_no
from paycore.v1 import payment_pb2, payment_service_pb2
from paycore.v1.payment_service_pb2_grpc import PaymentServiceStub
from tests.crash.told import Told, ToldOutcome, ToldPayment, ToldRefund, ToldWord

CHANNEL, MERCHANT, CURRENCY = "simbank", "shop", "CNY"
CALL_SECONDS = 4

_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
]
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


class GivenUpError(Exception):
    """A call was not answered although the server has not been killed for long."""


class Calls:
    """Calls a server that dies under them. told: where every answer is kept.

    unanswered: how many calls wait now. answered, cut: how many paycore answered, whatever it said, and how many lost
    their answer by its death, since ``begin``.
    """

    def __init__(self, address: str, told: Told, draw: random.Random) -> None:
        self._told = told
        self._draw = draw
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = PaymentServiceStub(self._channel)
        self._give_up_at: float | None = None
        self.unanswered = 0
        self.answered = 0
        self.cut = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    def begin(self) -> None:
        """A new server has been started."""
        self.answered = self.cut = 0

    def give_up_after(self, seconds: float) -> None:
        """No server is killed any more: a call that is not answered by then is an error."""
        self._give_up_at = asyncio.get_running_loop().time() + seconds

    async def pay(
        self, number: str, amount_minor: int, account: str, method: str, validity_ms: int
    ) -> payment_service_pb2.PayResponse:
        """Ask for a payment until there is an answer. Raises PaycoreRpcError where the server refuses."""
        request = pay_request(
            merchant_id=MERCHANT,
            merchant_order_no=number,
            amount_minor=amount_minor,
            currency=CURRENCY,
            subject=number,
            channel=CHANNEL,
            account=account,
            method=payment_pb2.PayMethod.Value(f"PAY_METHOD_{method}"),
            return_url="",
            validity_ms=validity_ms,
        )
        answer: payment_service_pb2.PayResponse = await self._ask(self._stub.Pay, request)
        self._told.payments.add(ToldPayment(answer.payment_id, number, amount_minor))
        if answer.HasField("attempt"):
            self._told.pages.add((answer.payment_id, answer.attempt.attempt))
        if answer.state == payment_pb2.PAYMENT_STATE_PAID:
            self._told.outcomes.add(ToldOutcome(answer.payment_id, "PAID", 0, ""))
        return answer

    async def query(self, payment_id: int) -> payment_pb2.Payment:
        """Read a payment."""
        answer = await self._ask(self._stub.Query, payment_service_pb2.QueryRequest(payment_id=payment_id))
        return self._remember(answer.payment)

    async def close(self, payment_id: int) -> payment_pb2.Payment:
        """Close a payment. Raises PaycoreRpcError where the server refuses for good."""
        try:
            answer = await self._ask(self._stub.Close, payment_service_pb2.CloseRequest(payment_id=payment_id))
        except PaycoreRpcError as error:
            if error.reason == "PAYMENT_PAID":
                self._told.outcomes.add(ToldOutcome(payment_id, "PAID", 0, ""))
            raise
        return self._remember(answer.payment)

    async def notify(self, request: payment_service_pb2.NotifyRequest) -> str:
        """Tell one word until it is taken; return the outcome's name."""
        answer = await self._ask(self._stub.Notify, request)
        return self._heard(request, answer)

    async def notify_batch(self, requests: Sequence[payment_service_pb2.NotifyRequest]) -> list[str]:
        """Tell several words in one call."""
        batch = payment_service_pb2.NotifyBatchRequest(notifications=requests)
        answer = await self._ask(self._stub.NotifyBatch, batch)
        return [self._heard(request, one) for request, one in zip(requests, answer.answers, strict=True)]

    def _heard(self, request: payment_service_pb2.NotifyRequest, answer: Any) -> str:
        outcome = payment_pb2.NotifyOutcome.Name(answer.outcome).removeprefix("NOTIFY_OUTCOME_")
        assert outcome not in {"INVALID", "THROTTLED"}, f"{request} was answered {outcome}"
        said = (request.account, request.channel_order_no, request.channel_trade_no, request.amount_minor)
        self._told.words.append(ToldWord(*said, outcome, answer.replayed))
        return outcome

    def _remember(self, payment: payment_pb2.Payment) -> payment_pb2.Payment:
        if payment.state == payment_pb2.PAYMENT_STATE_PAID:
            kept = payment.outcome
            self._told.outcomes.add(ToldOutcome(payment.payment_id, "PAID", kept.attempt, kept.channel_trade_no))
        if payment.state == payment_pb2.PAYMENT_STATE_CLOSED:
            self._told.outcomes.add(ToldOutcome(payment.payment_id, "CLOSED", 0, ""))
        back = (one for one in payment.refunds if one.state == payment_pb2.REFUND_STATE_REFUNDED)
        self._told.refunds.update(ToldRefund(payment.payment_id, one.refund_no) for one in back)
        return payment

    async def _ask(self, method: Any, request: Any) -> Any:
        """Ask until there is an answer that only paycore can give."""
        while True:
            self.unanswered += 1
            try:
                answer = await method(request, timeout=CALL_SECONDS, wait_for_ready=True)
            except grpc.aio.AioRpcError as raised:
                error = read_error(raised.code(), raised.details(), raised.trailing_metadata())
                self.answered += is_answer(error)
                self.cut += is_cut_off(error)
            else:
                self.answered += 1
                return answer
            finally:
                self.unanswered -= 1
            if not (error.retryable or error.code in _LOST):
                raise error
            self._check_patience(error)
            await asyncio.sleep(self._draw.uniform(0.02, 0.2))

    def _check_patience(self, error: PaycoreRpcError) -> None:
        if self._give_up_at is not None and asyncio.get_running_loop().time() > self._give_up_at:
            raise GivenUpError(f"no answer although no server is killed any more: {error}") from error


def is_answer(error: PaycoreRpcError) -> bool:
    """Whether paycore said it, rather than gRPC in its place."""
    return error.reason != error.code.name


def is_cut_off(error: PaycoreRpcError) -> bool:
    """Whether paycore died with the call in hand. Who has waited long enough is neither cut off nor answered."""
    return error.code is grpc.StatusCode.UNAVAILABLE and not is_answer(error)


def success(
    account: str, payment_id: int, attempt: int, trade_no: str, amount_minor: int, paid_at_ms: int | None
) -> payment_service_pb2.NotifyRequest:
    """A channel's word that an attempt was paid."""
    return notify_request(
        channel=CHANNEL,
        account=account,
        channel_order_no=format_channel_order_no(payment_id, attempt),
        result=payment_pb2.CHANNEL_RESULT_SUCCESS,
        amount_minor=amount_minor,
        currency=CURRENCY,
        channel_trade_no=trade_no,
        paid_at_ms=paid_at_ms,
    )


def failure(account: str, payment_id: int, attempt: int, amount_minor: int) -> payment_service_pb2.NotifyRequest:
    """A channel's word that an attempt failed."""
    return notify_request(
        channel=CHANNEL,
        account=account,
        channel_order_no=format_channel_order_no(payment_id, attempt),
        result=payment_pb2.CHANNEL_RESULT_FAILURE,
        amount_minor=amount_minor,
        currency=CURRENCY,
    )
