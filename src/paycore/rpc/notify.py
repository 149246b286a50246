"""Notify and NotifyBatch, the hot calls: bytes to values, one await for the commit, bytes back."""

import asyncio
from typing import cast

from paycore.domain.clock import Clock
from paycore.domain.decision import ABSENT_MS
from paycore.domain.errors import FieldViolation, InvalidArgumentError, ThrottledError
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import ChannelResult, NotifyOutcome
from paycore.rpc.convert import headers_json, instant_ms
from paycore.rpc.handling import Context
from paycore.usecases.notify import Notify
from paycore.v1 import payment_pb2, payment_service_pb2

MAX_BATCH = 10_000
"""Words in one NotifyBatch at most."""


class NotifyHandler:
    """Answers Notify. When its caller hangs up, only the answer is lost: what is queued is committed all the same."""

    def __init__(self, notify: Notify, clock: Clock) -> None:
        self._notify = notify
        self._clock = clock

    async def __call__(
        self, request: payment_service_pb2.NotifyRequest, context: Context
    ) -> payment_service_pb2.NotifyResponse:
        """Answer once what the word means is durable."""
        del context
        return _answer(await self._notify.notify(self._notification(request)))

    async def batch(
        self, request: payment_service_pb2.NotifyBatchRequest, context: Context
    ) -> payment_service_pb2.NotifyBatchResponse:
        """Answer each word for itself, in the order asked; raise where the whole could not be committed."""
        del context
        if not 1 <= len(request.notifications) <= MAX_BATCH:
            rule = f"must have 1 to {MAX_BATCH} entries, not {len(request.notifications)}"
            raise InvalidArgumentError([FieldViolation("notifications", rule)], "INVALID_BATCH")
        answers = await asyncio.gather(*map(self._answer_one, request.notifications))
        return payment_service_pb2.NotifyBatchResponse(answers=answers)

    async def _answer_one(self, request: payment_service_pb2.NotifyRequest) -> payment_service_pb2.NotifyResponse:
        try:
            return _answer(await self._notify.notify(self._notification(request)))
        except InvalidArgumentError as error:
            violations = [payment_service_pb2.FieldViolation(field=name, rule=rule) for name, rule in error.violations]
            return payment_service_pb2.NotifyResponse(
                outcome=payment_pb2.NotifyOutcome.ValueType(NotifyOutcome.INVALID), violations=violations
            )
        except ThrottledError:
            return _answer(Verdict(NotifyOutcome.THROTTLED))

    def _notification(self, request: payment_service_pb2.NotifyRequest) -> Notification:
        return Notification(
            channel=request.channel,
            account=request.account,
            channel_order_no=request.channel_order_no,
            result=_result(request.result),
            amount_minor=request.amount_minor,
            currency=request.currency,
            channel_trade_no=request.channel_trade_no,
            paid_at_ms=instant_ms(request.paid_at) if request.HasField("paid_at") else ABSENT_MS,
            received_at_ms=self._clock.now_ms(),
            raw=request.raw,
            headers=headers_json(request.headers),
        )


def _answer(verdict: Verdict) -> payment_service_pb2.NotifyResponse:
    return payment_service_pb2.NotifyResponse(
        outcome=payment_pb2.NotifyOutcome.ValueType(verdict.outcome),
        replayed=verdict.replayed,
        paid_at_untrusted=verdict.paid_at_untrusted,
        payment_id=verdict.payment_id,
        attempt=verdict.attempt,
    )


def _result(number: int) -> ChannelResult:
    """Read the result; a number that is none goes on as it came, for the use case to refuse and to count."""
    try:
        return ChannelResult(number)
    except ValueError:
        return cast(ChannelResult, number)
