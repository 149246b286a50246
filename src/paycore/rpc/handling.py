"""One call from bytes to bytes: parse, ask, serialise; and every error turned into a status.

gRPC hands over the request's bytes as they came (no deserialiser is registered), so that bytes which are no
message are the caller's INVALID_ARGUMENT and not the library's INTERNAL.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc.aio
from google.protobuf.message import DecodeError, Message

from paycore.domain.errors import FieldViolation, InvalidArgumentError
from paycore.rpc.status import abort

Context = grpc.aio.ServicerContext[bytes, bytes]
Handler = Callable[[bytes, Context], Awaitable[bytes]]

_Request = TypeVar("_Request", bound=Message)

MALFORMED_MESSAGE = "MALFORMED_MESSAGE"


def parse(kind: type[_Request], data: bytes) -> _Request:
    """Read a message. Raises InvalidArgumentError (MALFORMED_MESSAGE) exactly where protobuf refuses the bytes."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise malformed(kind) from None


def malformed(kind: type[Message]) -> InvalidArgumentError:
    """The error for bytes that are no message of this kind."""
    violation = FieldViolation("(message)", f"the bytes are no {kind.DESCRIPTOR.full_name}")
    return InvalidArgumentError([violation], MALFORMED_MESSAGE)


def raw_handler(method: Callable[[bytes], Awaitable[bytes]]) -> Handler:
    """Make a gRPC handler of a method that reads and writes its messages itself."""

    async def handle(data: bytes, context: Context) -> bytes:
        try:
            return await method(data)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
            await abort(context, error)

    return handle


def handler(kind: type[_Request], method: Callable[[_Request, Context], Awaitable[Message]]) -> Handler:
    """Make a gRPC handler of a method that takes and returns messages and raises errors of ``domain.errors``."""

    async def handle(data: bytes, context: Context) -> bytes:
        try:
            answer = await method(parse(kind, data), context)
            return answer.SerializeToString()
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller gets a status
            await abort(context, error)

    return handle
