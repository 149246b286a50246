"""Turns what went wrong into google.rpc.Status: code, ErrorInfo, field violations, and when a retry can help.

The tree of ``domain.errors`` is the whole of what callers are told. Anything else is a defect: it is logged with its
traceback and answered INTERNAL with a text that says nothing of ours.
"""

from typing import NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships stubs without py.typed

from paycore.domain.errors import (
    AlreadyExistsError,
    ChannelUnavailableError,
    InvalidArgumentError,
    NotFoundError,
    PaycoreError,
    PreconditionError,
    StoreUnavailableError,
    ThrottledError,
)

DOMAIN = "paycore"
DETAILS_KEY = "grpc-status-details-bin"

CODES: dict[type[PaycoreError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    ThrottledError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StoreUnavailableError: grpc.StatusCode.UNAVAILABLE,
    ChannelUnavailableError: grpc.StatusCode.UNAVAILABLE,
}

RETRY_DELAY_SECONDS = 1
"""What RetryInfo asks for: long enough to let a queue drain or a lock go, short for somebody who waits."""

# Clients refuse trailing metadata over 8 KiB by default and would then see neither code nor reason, so texts that
# could repeat a request are cut.
MAX_TEXT = 160
MAX_VIOLATIONS_BYTES = 2_000

_INTERNAL_TEXT = "an error inside paycore; its log has the details"

_log = structlog.get_logger()


def code_of(error: BaseException) -> grpc.StatusCode:
    """Return the gRPC code of an error: INTERNAL for what is not in the tree."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], error: Exception) -> NoReturn:
    """End a call with an error; what is not in the tree is logged with its traceback."""
    if code_of(error) is grpc.StatusCode.INTERNAL:
        _log.error("call_failed", error=type(error).__name__, exc_info=error)
    code, text, details = to_status(error)
    await context.abort(code, text, ((DETAILS_KEY, details),))
    raise AssertionError("abort raises")


def to_status(error: Exception) -> tuple[grpc.StatusCode, str, bytes]:
    """Return the code, the text and the serialised google.rpc.Status of an error."""
    code = code_of(error)
    known = error if isinstance(error, PaycoreError) and code is not grpc.StatusCode.INTERNAL else None
    text = _INTERNAL_TEXT if known is None else _cut(known.message)
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in _details(known):
        status.details.add().Pack(detail)
    return code, text, status.SerializeToString()


def _details(error: PaycoreError | None) -> list[Message]:
    retryable = error is not None and error.retryable
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason="INTERNAL" if error is None else error.reason)
    if error is not None:
        info.metadata.update({name: _cut(value) for name, value in error.metadata.items()})
    info.metadata["retryable"] = "true" if retryable else "false"
    details: list[Message] = [info]
    if isinstance(error, InvalidArgumentError):
        details.append(_bad_request(error))
    if retryable:
        details.append(error_details_pb2.RetryInfo(retry_delay=Duration(seconds=RETRY_DELAY_SECONDS)))
    return details


def _bad_request(error: InvalidArgumentError) -> Message:
    bad = error_details_pb2.BadRequest()
    for field, rule in error.violations:
        if bad.ByteSize() > MAX_VIOLATIONS_BYTES:
            break
        bad.field_violations.add(field=_cut(field), description=_cut(rule))
    message: Message = bad
    return message


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
