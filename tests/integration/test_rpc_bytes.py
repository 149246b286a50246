"""Bytes that are no message, or too many: a status that says so, and nothing written."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import grpc
import pytest

from paycore.client.errors import PaycoreRpcError, read_error
from paycore.v1 import payment_service_pb2 as v1
from tests.support.facts import contents
from tests.support.server import ServerProcess

SERVICE = "paycore.v1.PaymentService"
METHODS = ["Pay", "Notify", "Query", "Close"]
MAX_MESSAGE_BYTES = 131_072


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("bytes") / "paycore.db"
    with ServerProcess(path, env={"PAYCORE_MAX_MESSAGE_BYTES": str(MAX_MESSAGE_BYTES)}) as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as open_channel:
        yield open_channel


def send(channel: grpc.Channel, method: str, data: bytes) -> PaycoreRpcError | bytes:
    """Send bytes as they are; return the answer's bytes or the error."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{method}")
    try:
        return call(data, timeout=20)
    except grpc.RpcError as error:
        failed = cast(grpc.Call, error)
        return read_error(failed.code(), failed.details(), failed.trailing_metadata())


def refused(channel: grpc.Channel, method: str, data: bytes) -> PaycoreRpcError:
    error = send(channel, method, data)
    assert isinstance(error, PaycoreRpcError), f"answered with {error!r}"
    return error


def text_field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


MALFORMED = {
    "cut-varint": b"\x08\xff",
    "varint-of-eleven-bytes": b"\x08" + b"\xff" * 10 + b"\x01",
    "field-number-zero": b"\x00\x01",
    "wire-type-seven": b"\x0f\x01",
    "length-beyond-the-end": b"\x0a\x7fabc",
    "group-without-end": b"\x0b\x08\x01",
    "end-without-group": b"\x0c",
    "invalid-utf8-after-text": b"\x0a\x03ab\xff",
    "lone-surrogate": b"\x0a\x03\xed\xa0\x80",
}

# Field 1 is no text in Query and Close, so text is tried where there is one: Query's 3, Close's merchant_id.
UTF8_CASES = {"invalid-utf8-after-text", "lone-surrogate"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_bytes_are_the_callers_invalid_argument(
    server: ServerProcess, channel: grpc.Channel, method: str, name: str
) -> None:
    data = MALFORMED[name]
    if name in UTF8_CASES and method in ("Query", "Close"):
        data = text_field(2, data)
    before = contents(server.db_path)
    error = refused(channel, method, data)
    assert (error.code, error.reason, error.retryable) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "MALFORMED_MESSAGE",
        False,
    )
    assert contents(server.db_path) == before


@pytest.mark.parametrize("method", METHODS)
def test_random_bytes_are_refused_and_change_no_row(server: ServerProcess, channel: grpc.Channel, method: str) -> None:
    chance = random.Random(f"paycore {method}")
    before = contents(server.db_path)
    codes = set()
    for _ in range(300):
        error = refused(channel, method, chance.randbytes(chance.randint(1, 200)))
        codes.add(error.code)
        assert error.reason in {"MALFORMED_MESSAGE", "INVALID_ARGUMENT", "INVALID_NOTIFICATION", "PAYMENT_NOT_FOUND"}
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert contents(server.db_path) == before


@pytest.mark.parametrize("method", METHODS)
def test_empty_message_is_refused_by_field(server: ServerProcess, channel: grpc.Channel, method: str) -> None:
    before = contents(server.db_path)
    error = refused(channel, method, b"")
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations
    assert contents(server.db_path) == before


@pytest.mark.parametrize("method", METHODS)
def test_message_over_the_size_limit_is_resource_exhausted(
    server: ServerProcess, channel: grpc.Channel, method: str
) -> None:
    before = contents(server.db_path)
    error = refused(channel, method, b"\x7a" + b"\x80\x80\x10" + b"x" * 262_144)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not error.retryable
    assert contents(server.db_path) == before


def test_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    assert refused(channel, "Refund", b"").code is grpc.StatusCode.UNIMPLEMENTED


def success(**changes: object) -> v1.NotifyRequest:
    fields: dict[str, object] = {
        "channel": "simbank",
        "account": "bank_a",
        "channel_order_no": "no order of ours",
        "result": 1,
        "amount_minor": 5,
        "currency": "CNY",
        "channel_trade_no": "T-1",
    }
    return v1.NotifyRequest(**{**fields, **changes})  # type: ignore[arg-type]  # rows of the table below


INVALID_NOTIFICATIONS: list[tuple[str, dict[str, object]]] = [
    ("amount_minor", {"amount_minor": 0}),
    ("amount_minor", {"amount_minor": -1}),
    ("amount_minor", {"amount_minor": -(2**63)}),
    ("amount_minor", {"amount_minor": -1, "result": 2}),
    ("channel_trade_no", {"channel_trade_no": ""}),
    ("channel_trade_no", {"channel_trade_no": "T\0"}),
    ("channel_trade_no", {"channel_trade_no": "T" * 65}),
    ("channel", {"channel": "c" * 33}),
    ("channel", {"channel": "\0"}),
    ("account", {"account": "a" * 65}),
    ("channel_order_no", {"channel_order_no": "1" * 65}),
    ("currency", {"currency": "C" * 17}),
    ("result", {"result": 0}),
    ("result", {"result": 3}),
    ("raw", {"raw": b"x" * 65_537}),
    ("headers", {"headers": {"name": "v" * 8_192}}),
    ("headers", {"headers": {"name": "\0"}}),
]


@pytest.mark.parametrize(("field", "changes"), INVALID_NOTIFICATIONS)
def test_notification_that_cannot_be_evidence_is_invalid_and_not_kept(
    server: ServerProcess, channel: grpc.Channel, field: str, changes: dict[str, object]
) -> None:
    before = contents(server.db_path)
    error = refused(channel, "Notify", success(**changes).SerializeToString())
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NOTIFICATION")
    assert [one.field for one in error.violations] == [field]
    assert contents(server.db_path) == before


def test_notification_with_the_largest_raw_and_unknown_fields_is_taken(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    data = success(raw=b"x" * 65_536, channel_trade_no="T-raw").SerializeToString() + b"\xf8\x07\x01"
    answer = send(channel, "Notify", data)
    assert isinstance(answer, bytes)
    assert v1.NotifyResponse.FromString(answer).outcome == 7
    assert any(b"x" * 65_536 in row for row in contents(server.db_path)["quarantine"])


def test_log_of_the_server_holds_no_traceback_after_bad_input(server: ServerProcess, channel: grpc.Channel) -> None:
    for method in METHODS:
        refused(channel, method, b"\xff")
    assert Path(server.log_path).exists()
    assert "Traceback" not in server.log()
    assert "call_failed" not in server.log()
