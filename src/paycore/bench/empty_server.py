"""The baseline: a grpc.aio server whose handlers do nothing.

Bytes in, always the same bytes out; no message is parsed or built. Methods, options and event loop are those of
``paycore serve``. A process of its own: ``python -m paycore.bench.empty_server READY_FILE [WORDS]``, where WORDS is
how many words the answer to NotifyBatch holds.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio

from paycore.v1 import payment_pb2, payment_service_pb2

SERVICE = payment_service_pb2.DESCRIPTOR.services_by_name["PaymentService"].full_name
METHOD = f"/{SERVICE}/Notify"
BATCH_METHOD = f"/{SERVICE}/NotifyBatch"
MAX_MESSAGE_BYTES = 67_108_864

_ACCEPTED = payment_service_pb2.NotifyResponse(
    outcome=payment_pb2.NOTIFY_OUTCOME_ACCEPTED, payment_id=253_000_000_000_000_000, attempt=2
)
ANSWER = _ACCEPTED.SerializeToString()
"""As large as the answer to a first notification."""


def batch_answer(words: int) -> bytes:
    """As large as the answer to a batch of first notifications."""
    return payment_service_pb2.NotifyBatchResponse(answers=[_ACCEPTED] * words).SerializeToString()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The event loop that ``paycore serve`` takes."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _always(
    answer: bytes,
) -> "grpc.RpcMethodHandler[bytes, bytes]":
    async def handle(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        del data, context
        return answer

    return grpc.unary_unary_rpc_method_handler(handle)


async def serve(ready_file: Path, words: int) -> None:
    """Serve on a free port of loopback until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)))
    handlers = {"Notify": _always(ANSWER), "NotifyBatch": _always(batch_answer(words))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    unfinished = ready_file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"address": f"127.0.0.1:{port}", "pid": os.getpid()}), encoding="utf-8")
    unfinished.replace(ready_file)
    await stopping.wait()
    await server.stop(None)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
