"""The gRPC server: the service's methods on raw bytes, health and reflection, bound to loopback."""

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from paycore.failpoint import failpoint
from paycore.rpc.handling import Context, Handler, handler, raw_handler
from paycore.rpc.listen import LISTEN_SETTING, TcpAddress, UnixAddress, check_free, taken
from paycore.rpc.notify import NotifyHandler
from paycore.rpc.payments import PaymentHandlers
from paycore.v1 import payment_service_pb2

SERVICE = payment_service_pb2.DESCRIPTOR.services_by_name["PaymentService"].full_name
HEALTH_NAMES = ("", SERVICE)

_LAST_ANSWERS_SECONDS = 1
"""How long answers that are on their way may take; only a stream that does not end makes the server wait for it."""


class _InFlight:
    """Counts the calls that are being answered, so that a drain waits for them and for nothing else."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def counted(self, name: str, answer: Handler) -> Handler:
        """Count a handler's calls."""
        before_answer = f"rpc.{name}.before_answer"

        async def handle(data: bytes, context: Context) -> bytes:
            self._count += 1
            self._idle.clear()
            try:
                answered = await answer(data, context)
                failpoint(before_answer)
                return answered
            finally:
                self._count -= 1
                if not self._count:
                    self._idle.set()

        return handle

    @property
    def idle(self) -> bool:
        """Whether no call is being answered."""
        return self._idle.is_set()

    async def wait_idle(self) -> None:
        """Return when no call is being answered."""
        await self._idle.wait()


class RpcServer:
    """Serves PaymentService, health and reflection. ``bind``, ``start``, ``set_serving``, ``drain``: in this order.

    shared_port: whether other processes take calls on the same address. Somebody else then holds it for all of them.
    """

    def __init__(
        self, notify: NotifyHandler, payments: PaymentHandlers, *, max_message_bytes: int, shared_port: bool = False
    ) -> None:
        self._shared_port = shared_port
        self._health = health.aio.HealthServicer()
        self._in_flight = _InFlight()
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", max_message_bytes),
                # Without this, a second server would share the port and get half the calls.
                ("grpc.so_reuseport", int(shared_port)),
            )
        )
        methods = {
            "Pay": handler(payment_service_pb2.PayRequest, payments.pay),
            "Notify": raw_handler(notify.one),
            "NotifyBatch": raw_handler(notify.batch),
            "Query": handler(payment_service_pb2.QueryRequest, payments.query),
            "Close": handler(payment_service_pb2.CloseRequest, payments.close),
        }
        counted = {name: self._counted(name, answer) for name, answer in methods.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, counted),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    def _counted(self, name: str, answer: Handler) -> "grpc.RpcMethodHandler[bytes, bytes]":
        # No deserialiser and no serialiser: bytes go in and out as they are.
        return grpc.unary_unary_rpc_method_handler(self._in_flight.counted(name, answer))

    def bind(self, address: TcpAddress | UnixAddress) -> TcpAddress | UnixAddress:
        """Take the address; return it with the real port. Raises ListenRefusedError."""
        if not self._shared_port:
            check_free(LISTEN_SETTING, address)
        try:
            port = self._server.add_insecure_port(str(address))
        except RuntimeError:
            raise taken(LISTEN_SETTING, address, "cannot be bound") from None
        return address._replace(port=port) if isinstance(address, TcpAddress) else address

    async def start(self) -> None:
        """Take calls. Health says NOT_SERVING until ``set_serving``."""
        await self.set_serving(False)
        await self._server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks, the waiting ones included."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in HEALTH_NAMES:
            await self._health.set(name, status)

    async def drain(self, grace_ms: int) -> None:
        """Say NOT_SERVING, take no new call, and let those in flight end; after the grace they are cancelled.

        Streams of health and reflection, which need not ever end, are not waited for.
        """
        await self._health.enter_graceful_shutdown()
        stopping = asyncio.create_task(self._server.stop(grace_ms / 1_000))
        # The stop must have begun before calls are counted, so that none begins after the last was seen to end.
        await asyncio.sleep(0)
        while not stopping.done() and not await self._quiet(stopping):
            pass
        await self._server.stop(None)
        await stopping

    async def _quiet(self, stopping: "asyncio.Task[None]") -> bool:
        """Wait until no call is being answered and the last answers are sent; False when another call began."""
        idle = asyncio.create_task(self._in_flight.wait_idle())
        await asyncio.wait({stopping, idle}, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        await asyncio.wait({stopping}, timeout=_LAST_ANSWERS_SECONDS)
        return self._in_flight.idle
