"""Pay, Query and Close: messages to commands, use cases, messages back."""

from typing import NamedTuple, cast

from paycore.domain.clock import Clock
from paycore.domain.errors import FieldViolation, InvalidArgumentError
from paycore.rpc.convert import attempt_message, duration_ms, payment_message, timestamp_of
from paycore.rpc.handling import Context
from paycore.usecases.close import Close
from paycore.usecases.keys import ByChannelOrder, ByMerchantOrder, ByPaymentId, PaymentKey
from paycore.usecases.pay import Pay
from paycore.usecases.pay_command import PayCommand
from paycore.usecases.query import Query
from paycore.v1 import payment_pb2, payment_service_pb2


class UseCases(NamedTuple):
    """What the handlers call."""

    pay: Pay
    query: Query
    close: Close


class PaymentHandlers:
    """Answers Pay, Query and Close. pay_timeout_ms: how long a call that talks to channels takes at most.

    That bounds Pay and a refreshing Query, whatever deadline their callers set.
    """

    def __init__(self, usecases: UseCases, clock: Clock, *, pay_timeout_ms: int) -> None:
        self._usecases = usecases
        self._clock = clock
        self._pay_timeout_ms = pay_timeout_ms

    async def pay(self, request: payment_service_pb2.PayRequest, context: Context) -> payment_service_pb2.PayResponse:
        """Open a payment, or find it again."""
        result = await self._usecases.pay.pay(pay_command(request), deadline_ms=self._deadline_ms(context))
        return payment_service_pb2.PayResponse(
            payment_id=result.payment.payment_id,
            state=payment_pb2.PaymentState.ValueType(result.state),
            next_action=payment_service_pb2.PayNextAction.ValueType(result.next_action),
            attempt=None if result.attempt is None else attempt_message(result.attempt),
            expire_at=timestamp_of(result.payment.expire_at_ms),
        )

    async def query(
        self, request: payment_service_pb2.QueryRequest, context: Context
    ) -> payment_service_pb2.QueryResponse:
        """Read a payment; asked to refresh it, ask its channels first, within the caller's deadline."""
        key = query_key(request)
        if not request.refresh:
            return payment_service_pb2.QueryResponse(payment=payment_message(await self._usecases.query.find(key)))
        file, unanswered = await self._usecases.query.refresh(key, deadline_ms=self._deadline_ms(context))
        return payment_service_pb2.QueryResponse(payment=payment_message(file), unanswered_attempts=unanswered)

    async def close(
        self, request: payment_service_pb2.CloseRequest, context: Context
    ) -> payment_service_pb2.CloseResponse:
        """Close a payment."""
        del context
        file = await self._usecases.close.close(close_key(request))
        return payment_service_pb2.CloseResponse(payment=payment_message(file))

    def _deadline_ms(self, context: Context) -> int:
        # None without a deadline, which the types do not say.
        remaining_seconds = cast("float | None", context.time_remaining())
        remaining_ms = self._pay_timeout_ms if remaining_seconds is None else int(remaining_seconds * 1_000)
        return self._clock.now_ms() + min(remaining_ms, self._pay_timeout_ms)


def pay_command(request: payment_service_pb2.PayRequest) -> PayCommand:
    """Read a PayRequest. Raises InvalidArgumentError where validity is no Duration; the use case checks the rest."""
    return PayCommand(
        merchant_id=request.merchant_id,
        merchant_order_no=request.merchant_order_no,
        amount_minor=request.amount_minor,
        currency=request.currency,
        subject=request.subject,
        return_url=request.return_url,
        validity_ms=duration_ms(request.validity, "validity") if request.HasField("validity") else None,
        channel=request.channel,
        account=request.account,
        method=request.method,
    )


def query_key(request: payment_service_pb2.QueryRequest) -> PaymentKey:
    """Read which payment is meant. Raises InvalidArgumentError when no key is given."""
    match request.WhichOneof("key"):
        case "payment_id":
            return ByPaymentId(request.payment_id)
        case "merchant_order":
            return _by_merchant_order(request.merchant_order)
        case "channel_order_no":
            return ByChannelOrder(request.channel_order_no)
        case None:
            raise _no_key()


def close_key(request: payment_service_pb2.CloseRequest) -> PaymentKey:
    """Read which payment is meant. Raises InvalidArgumentError when no key is given."""
    match request.WhichOneof("key"):
        case "payment_id":
            return ByPaymentId(request.payment_id)
        case "merchant_order":
            return _by_merchant_order(request.merchant_order)
        case None:
            raise _no_key()


def _by_merchant_order(key: payment_pb2.MerchantOrderKey) -> ByMerchantOrder:
    return ByMerchantOrder(key.merchant_id, key.merchant_order_no)


def _no_key() -> InvalidArgumentError:
    return InvalidArgumentError([FieldViolation("key", "name the payment by exactly one key")])
