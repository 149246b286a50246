"""Carries the bank's notifications to paycore: verifies the signature, calls Notify, answers the bank.

The bank is answered 200 only when Notify returned OK, that is when the word is durable. A word that Notify refuses
for good (INVALID_ARGUMENT) is answered 400, everything else 503, so that the bank sends again. It keeps nothing.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import grpc
import grpc.aio
import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from paycore.simbank.clock import Clock
from paycore.simbank.signing import DEFAULT_WINDOW_MS, SignatureError, Verifier
from paycore.simbank.web import ApiError, error_answer, limited_body, parsed, target_of
from paycore.v1 import payment_pb2, payment_service_pb2
from paycore.v1.payment_service_pb2_grpc import PaymentServiceStub

if TYPE_CHECKING:
    from paycore.v1.payment_service_pb2_grpc import PaymentServiceAsyncStub

logger = structlog.get_logger("forwarder")

_KEPT_HEADERS = ("content-type", "simbank-timestamp", "simbank-nonce", "simbank-signature")
_RESULTS = {
    "SUCCESS": payment_pb2.CHANNEL_RESULT_SUCCESS,
    "FAILURE": payment_pb2.CHANNEL_RESULT_FAILURE,
}
# A server that comes back is found at once: the default waits up to two minutes.
_CHANNEL_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Bounds one connection attempt; how soon the next follows is the first line.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # paycore listens on loopback; a proxy of the environment would look for it elsewhere.
    ("grpc.enable_http_proxy", 0),
]

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


@dataclass(frozen=True)
class ForwarderConfig:
    """server: paycore's gRPC address; channel: the name under which paycore knows these banks."""

    server: str
    secrets: Mapping[str, SecretStr]
    channel: str = "simbank"
    notify_timeout_ms: int = 4_000
    window_ms: int = DEFAULT_WINDOW_MS


class BankNotification(BaseModel):
    """What the bank sends. Only types are checked here: what the values mean is for paycore to judge."""

    model_config = ConfigDict(strict=True, frozen=True)

    notification_id: str
    bank: str
    result: Literal["SUCCESS", "FAILURE"]
    order_no: str
    trade_no: str
    amount_minor: Int64
    currency: str
    paid_at_ms: Int64 | None


class Forwarder:
    """The one handler with what it needs."""

    def __init__(self, config: ForwarderConfig, clock: Clock, stub: "PaymentServiceAsyncStub") -> None:
        self._config = config
        self._verifier = Verifier(config.secrets, clock, config.window_ms)
        self._stub = stub

    async def receive(self, request: Request) -> Response:
        """POST /notifications/{bank}."""
        bank = request.path_params["bank"]
        body = await limited_body(request)
        try:
            self._verifier.verify(bank, target_of(request), request.headers, body)
        except SignatureError as error:
            logger.warning("notification_refused", code=error.code)
            raise ApiError(401, error.code, "the notification's signature was not accepted") from None
        notification = parsed(BankNotification, body)
        if notification.bank != bank:
            raise ApiError(400, "INVALID_REQUEST", "bank: differs from the address")
        await self._notify(notification, notify_request(self._config.channel, notification, body, request.headers))
        return JSONResponse({"code": "OK"})

    async def _notify(self, notification: BankNotification, request: payment_service_pb2.NotifyRequest) -> None:
        log = logger.bind(
            bank=notification.bank, order_no=notification.order_no, notification_id=notification.notification_id
        )
        try:
            answer = await self._stub.Notify(request, timeout=self._config.notify_timeout_ms / 1000)
        except grpc.aio.AioRpcError as error:
            log.warning("notify_failed", status=error.code().name, details=error.details())
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise ApiError(400, "REFUSED", "paycore cannot take this as evidence") from None
            raise ApiError(503, "UNAVAILABLE", "paycore did not take it; send again") from None
        log.info("notified", outcome=payment_pb2.NotifyOutcome.Name(answer.outcome), replayed=answer.replayed)


def notify_request(
    channel: str, notification: BankNotification, body: bytes, headers: Mapping[str, str]
) -> payment_service_pb2.NotifyRequest:
    """Put the bank's word into paycore's, with the body and its signature headers as evidence."""
    paid_at_ms = notification.paid_at_ms
    return payment_service_pb2.NotifyRequest(
        channel=channel,
        account=notification.bank,
        channel_order_no=notification.order_no,
        result=_RESULTS[notification.result],
        amount_minor=notification.amount_minor,
        currency=notification.currency,
        channel_trade_no=notification.trade_no,
        paid_at=None if paid_at_ms is None else _timestamp(paid_at_ms),
        raw=body,
        headers={name: headers[name] for name in _KEPT_HEADERS if name in headers},
    )


def _timestamp(instant_ms: int) -> Timestamp:
    seconds, milliseconds = divmod(instant_ms, 1000)
    return Timestamp(seconds=seconds, nanos=milliseconds * 1_000_000)


def build(config: ForwarderConfig, clock: Clock) -> Starlette:
    """Return the application. It connects to paycore when the first notification comes."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with grpc.aio.insecure_channel(config.server, options=_CHANNEL_OPTIONS) as channel:
            app.state.forwarder = Forwarder(config, clock, PaymentServiceStub(channel))
            yield

    async def receive(request: Request) -> Response:
        forwarder: Forwarder = request.app.state.forwarder
        return await forwarder.receive(request)

    routes = [Route("/notifications/{bank}", receive, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={ApiError: error_answer})
