"""Errors as google.rpc.Status: one row an error, with what a caller is told."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships stubs without py.typed

from paycore.domain import errors
from paycore.domain.errors import (
    AlreadyExistsError,
    ChannelUnavailableError,
    FieldViolation,
    InvalidArgumentError,
    NotFoundError,
    PaycoreError,
    PreconditionError,
    StoreUnavailableError,
    ThrottledError,
)
from paycore.rpc.status import CODES, code_of, to_status

Code = grpc.StatusCode

ROWS: list[tuple[Exception, grpc.StatusCode, str, bool]] = [
    (InvalidArgumentError([FieldViolation("a", "b")]), Code.INVALID_ARGUMENT, "INVALID_ARGUMENT", False),
    (InvalidArgumentError([FieldViolation("a", "b")], "OTHER"), Code.INVALID_ARGUMENT, "OTHER", False),
    (NotFoundError("PAYMENT_NOT_FOUND", "no"), Code.NOT_FOUND, "PAYMENT_NOT_FOUND", False),
    (AlreadyExistsError(["currency"]), Code.ALREADY_EXISTS, "TERMS_DIFFER", False),
    (PreconditionError("PAYMENT_PAID", "no"), Code.FAILED_PRECONDITION, "PAYMENT_PAID", False),
    (PreconditionError("WAIT", "no", retryable=True), Code.FAILED_PRECONDITION, "WAIT", True),
    (ThrottledError("QUEUE_FULL", "no"), Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", True),
    (StoreUnavailableError("STORE_UNAVAILABLE", "no"), Code.UNAVAILABLE, "STORE_UNAVAILABLE", True),
    (ChannelUnavailableError("CHANNEL_UNKNOWN", "no"), Code.UNAVAILABLE, "CHANNEL_UNKNOWN", True),
    (PaycoreError("STRANGER", "secret"), Code.INTERNAL, "INTERNAL", False),
    (KeyError("secret"), Code.INTERNAL, "INTERNAL", False),
]


def details(error: Exception) -> dict[str, Any]:
    """The status of an error, its details by the name of their type."""
    _, _, data = to_status(error)
    status = status_pb2.Status.FromString(data)
    found: dict[str, Any] = {"status": status}
    for detail in status.details:
        name = detail.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return found


@pytest.mark.parametrize(("error", "code", "reason", "retryable"), ROWS)
def test_status_of_error_has_code_reason_and_retryability(
    error: Exception, code: grpc.StatusCode, reason: str, retryable: bool
) -> None:
    found = details(error)
    assert (to_status(error)[0], found["status"].code) == (code, code.value[0])
    assert (found["ErrorInfo"].domain, found["ErrorInfo"].reason) == ("paycore", reason)
    assert found["ErrorInfo"].metadata["retryable"] == str(retryable).lower()
    assert ("RetryInfo" in found) is retryable


def test_every_error_of_the_tree_has_a_code_of_its_own() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PaycoreError)]
    assert set(CODES) == set(classes) - {PaycoreError}


def test_subclass_of_an_error_gets_the_code_of_its_base() -> None:
    class SpecialError(NotFoundError):
        pass

    assert code_of(SpecialError("X", "x")) is Code.NOT_FOUND


def test_violations_name_every_field_and_rule() -> None:
    found = details(InvalidArgumentError([FieldViolation("amount_minor", "low"), FieldViolation("currency", "what")]))
    violations = [(one.field, one.description) for one in found["BadRequest"].field_violations]
    assert violations == [("amount_minor", "low"), ("currency", "what")]


def test_metadata_of_an_error_is_passed_on() -> None:
    assert details(AlreadyExistsError(["amount_minor", "currency"]))["ErrorInfo"].metadata["fields"] == (
        "amount_minor, currency"
    )


@pytest.mark.parametrize("error", [KeyError("s3cret"), PaycoreError("X", "s3cret"), RuntimeError("s3cret")])
def test_unexpected_error_tells_the_caller_nothing_of_ours(error: Exception) -> None:
    code, text, data = to_status(error)
    assert code is Code.INTERNAL
    assert "s3cret" not in text
    assert b"s3cret" not in data


HUGE = [
    InvalidArgumentError([FieldViolation("x" * 100_000, "x" * 100_000)] * 1_000),
    InvalidArgumentError([FieldViolation("钱" * 100_000, "钱" * 100_000)] * 1_000),
    PreconditionError("CHANNEL_REFUSED", "钱" * 100_000, metadata={"code": "钱" * 100_000, "text": "钱" * 100_000}),
]


@pytest.mark.parametrize("error", HUGE, ids=["ascii", "chinese", "metadata"])
def test_long_texts_are_cut_so_that_the_trailing_metadata_fits(error: Exception) -> None:
    _, text, data = to_status(error)
    assert text.endswith("…")
    # The text travels percent-encoded, the details in base 64, both within gRPC's default limit of 8 KiB.
    assert len(quote(text)) + len(base64.b64encode(data)) < 8_000
