"""Notify, the hot call: bytes to values, one await for the commit, bytes back."""

from typing import cast

from paycore.domain.clock import Clock
from paycore.domain.decision import ABSENT_MS
from paycore.domain.notification import Notification
from paycore.domain.verdicts import ChannelResult
from paycore.rpc.convert import headers_json, instant_ms
from paycore.rpc.handling import Context
from paycore.usecases.notify import Notify
from paycore.v1 import payment_pb2, payment_service_pb2


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
        verdict = await self._notify.notify(self._notification(request))
        return payment_service_pb2.NotifyResponse(
            outcome=payment_pb2.NotifyOutcome.ValueType(verdict.outcome),
            replayed=verdict.replayed,
            paid_at_untrusted=verdict.paid_at_untrusted,
            payment_id=verdict.payment_id,
            attempt=verdict.attempt,
        )

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


def _result(number: int) -> ChannelResult:
    """Read the result; a number that is none goes on as it came, for the use case to refuse and to count."""
    try:
        return ChannelResult(number)
    except ValueError:
        return cast(ChannelResult, number)
