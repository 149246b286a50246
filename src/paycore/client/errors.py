"""The one error that the clients raise, read from google.rpc.Status where the server sent one."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships stubs without py.typed

DETAILS_KEY = "grpc-status-details-bin"

# Every call of the API may be repeated, so a call whose answer never came may be, too.
_RETRYABLE_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


class Violation(NamedTuple):
    """Which field of the request breaks which rule."""

    field: str
    rule: str


class PaycoreRpcError(Exception):
    """A call that was refused, or that could not be answered.

    code: the gRPC status. reason: UPPER_SNAKE and stable, fit to branch on; the code's name where the answer did not
    come from paycore (no connection, deadline passed). retryable: whether the same call can succeed later without
    anybody changing something. violations: for INVALID_ARGUMENT. metadata: further facts, by name. retry_after_ms: how
    long to wait before the next try, where the server says so.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        retryable: bool,
        violations: Iterable[Violation] = (),
        metadata: Mapping[str, str] | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(f"{reason}: {message}")
        self.code = code
        self.reason = reason
        self.message = message
        self.retryable = retryable
        self.violations = tuple(violations)
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after_ms = retry_after_ms

    def copy(self) -> Self:
        """Return an equal error of its own: one that is raised in several places would mix their tracebacks."""
        return type(self)(
            self.code,
            self.reason,
            self.message,
            retryable=self.retryable,
            violations=self.violations,
            metadata=self.metadata,
            retry_after_ms=self.retry_after_ms,
        )


def read_error(
    code: grpc.StatusCode, message: str | None, trailing: Iterable[tuple[str, str | bytes]] | None
) -> PaycoreRpcError:
    """Build the error from what gRPC received."""
    reason, retryable = code.name, code in _RETRYABLE_CODES
    metadata: dict[str, str] = {}
    violations: list[Violation] = []
    retry_after_ms: int | None = None
    for detail in _details(trailing):
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
            retryable = metadata.pop("retryable", "false") == "true"
        elif detail.Unpack(bad):
            violations += [Violation(one.field, one.description) for one in bad.field_violations]
        elif detail.Unpack(retry):
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    return PaycoreRpcError(
        code,
        reason,
        message or "no message",
        retryable=retryable,
        violations=violations,
        metadata=metadata,
        retry_after_ms=retry_after_ms,
    )


def _details(trailing: Iterable[tuple[str, str | bytes]] | None) -> list[Any]:
    for key, value in trailing or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                break
    return []
