"""A gRPC server that hands NotifyBatch on to a real one: it sees each call, can hold it, and can refuse it itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc

from paycore.client.gathering import METHOD
from paycore.v1.payment_service_pb2 import NotifyBatchRequest

SECONDS = 20

Refusal = tuple[grpc.StatusCode, bytes | None]
"""A code, and the serialised google.rpc.Status that goes with it."""


class Relay:
    """Entered and left like a file. `address` is where clients go; `sizes` is how many words each call brought."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._forward: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(METHOD)
        self._server = grpc.server(ThreadPoolExecutor(16))
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._handle)
        service, _, name = METHOD.strip("/").partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._changed = threading.Condition()
        self._passes = math.inf
        self._arrived = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.refuse: Callable[[NotifyBatchRequest, int], Refusal | None] = lambda _request, _call: None
        """Given a request and the number of its call, from 1: how to refuse it, or None to hand it on."""
        self.answer: bytes | None = None
        """What to answer in place of the real server's answer."""

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.stop(None).wait()
        self._channel.close()

    def hold(self) -> None:
        """Keep calls from now on until ``release``."""
        with self._changed:
            self._passes = 0

    def release(self, calls: float = math.inf) -> None:
        """Let so many calls go on."""
        with self._changed:
            self._passes += calls
            self._changed.notify_all()

    def wait_arrived(self) -> None:
        """Return when one call more has come than was waited for before."""
        assert self._arrived.acquire(timeout=SECONDS), "no call came"

    def _handle(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        request = NotifyBatchRequest.FromString(data)
        self.sizes.append(len(request.notifications))
        refusal = self.refuse(request, len(self.sizes))
        self._arrived.release()
        with self._changed:
            self._changed.wait_for(lambda: self._passes > 0, SECONDS)
            self._passes -= 1
        if refusal is not None:
            code, details = refusal
            context.set_trailing_metadata(() if details is None else (("grpc-status-details-bin", details),))
            context.abort(code, "refused by the relay")
        return self._forward(data, timeout=SECONDS) if self.answer is None else self.answer
