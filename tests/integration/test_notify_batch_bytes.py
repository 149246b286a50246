"""Notifications as bytes to a real server: too many, none, cut anywhere, and 64 MB of nothing."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import cast

import grpc
import pytest
from google.protobuf.message import DecodeError

from paycore.client.errors import PaycoreRpcError, read_error
from paycore.rpc.notify import MAX_BATCH
from paycore.v1 import payment_pb2
from paycore.v1 import payment_service_pb2 as v1
from tests.support import facts
from tests.support.server import ServerProcess

NOTIFY = "/paycore.v1.PaymentService/Notify"
NOTIFY_BATCH = "/paycore.v1.PaymentService/NotifyBatch"
MAX_MESSAGE_BYTES = 67_108_864
DEFAULT_BYTES = 8_388_608
OUTCOMES = payment_pb2.NotifyOutcome


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that reads the largest messages there may be."""
    path = tmp_path_factory.mktemp("batch") / "paycore.db"
    with ServerProcess(path, env={"PAYCORE_MAX_MESSAGE_BYTES": str(MAX_MESSAGE_BYTES)}) as process:
        yield process


@pytest.fixture(scope="module")
def usual_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose largest message nobody has chosen."""
    with ServerProcess(tmp_path_factory.mktemp("usual") / "paycore.db") as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as open_channel:
        yield open_channel


def send(channel: grpc.Channel, data: bytes, method: str = NOTIFY_BATCH) -> PaycoreRpcError | v1.NotifyBatchResponse:
    """Send bytes as they are; return the batch's answer or the error."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
    try:
        return v1.NotifyBatchResponse.FromString(call(data, timeout=30))
    except grpc.RpcError as error:
        failed = cast(grpc.Call, error)
        return read_error(failed.code(), failed.details(), failed.trailing_metadata())


def word(order_no: str, **changes: object) -> v1.NotifyRequest:
    fields: dict[str, object] = {
        "channel": "simbank",
        "account": "bank_a",
        "channel_order_no": order_no,
        "result": 1,
        "amount_minor": facts.AMOUNT_MINOR,
        "currency": facts.CURRENCY,
        "channel_trade_no": f"T{order_no}",
    }
    return v1.NotifyRequest(**{**fields, **changes})  # type: ignore[arg-type]  # each has the type of its field


def batch(*words: v1.NotifyRequest) -> bytes:
    return v1.NotifyBatchRequest(notifications=words).SerializeToString()


def counted(server: ServerProcess) -> int:
    """How many words the server says that it has answered."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("paycore_notify_total{")))


def test_batch_of_more_than_its_limit_and_an_empty_one_are_refused_whole(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    before, words = facts.contents(server.db_path), counted(server)
    for count in (MAX_BATCH + 1, 0):
        error = send(channel, batch(*[word("1")] * count))
        assert isinstance(error, PaycoreRpcError)
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_BATCH")
        assert not error.retryable
        ((field, rule),) = error.violations
        assert (field, rule) == ("notifications", f"must have 1 to {MAX_BATCH} entries, not {count}")
    assert (facts.contents(server.db_path), counted(server)) == (before, words)


def test_batch_of_exactly_the_limit_is_answered_word_by_word(server: ServerProcess, channel: grpc.Channel) -> None:
    before = counted(server)
    answer = send(channel, batch(*[word("nobody's")] * MAX_BATCH))
    assert isinstance(answer, v1.NotifyBatchResponse)
    assert [one.outcome for one in answer.answers] == [OUTCOMES.NOTIFY_OUTCOME_UNKNOWN] * MAX_BATCH
    assert counted(server) - before == MAX_BATCH
    rows = facts.select(server.db_path, "SELECT arrivals FROM quarantine WHERE channel_order_no = ?", "nobody's")
    assert rows == [(MAX_BATCH,)]


def test_invalid_word_is_answered_with_its_field_and_the_others_are_kept(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    answer = send(channel, batch(word("good-1"), word("bad", amount_minor=0, channel_trade_no=""), word("good-2")))
    assert isinstance(answer, v1.NotifyBatchResponse)
    assert [one.outcome for one in answer.answers] == [7, 9, 7]
    assert [[one.field for one in each.violations] for each in answer.answers] == [
        [],
        ["amount_minor", "channel_trade_no"],
        [],
    ]
    kept = {number for (number,) in facts.select(server.db_path, "SELECT channel_order_no FROM quarantine")}
    assert {"good-1", "good-2"} <= kept
    assert "bad" not in kept


def test_batch_cut_anywhere_is_malformed_or_what_the_library_reads(
    server: ServerProcess, channel: grpc.Channel
) -> None:
    whole = batch(word("cut-1", raw=b"\0\1", headers={"a": "b"}), word("cut-2", channel_trade_no="銀行"))
    before, answered = counted(server), 0
    codes = set()
    for length in range(len(whole) + 1):
        data = whole[:length]
        said = send(channel, data)
        try:
            count = len(v1.NotifyBatchRequest.FromString(data).notifications)
        except DecodeError:
            assert isinstance(said, PaycoreRpcError), length
            assert (said.code, said.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
            codes.add("malformed")
            continue
        if count == 0:
            assert isinstance(said, PaycoreRpcError)
            assert said.reason == "INVALID_BATCH"
        else:
            assert isinstance(said, v1.NotifyBatchResponse)
            assert len(said.answers) == count
            answered += count
            codes.add(f"read {count}")
    assert codes == {"malformed", "read 1", "read 2"}
    assert counted(server) - before == answered == 3
    rows = facts.select(
        server.db_path,
        "SELECT channel_order_no, arrivals FROM quarantine WHERE channel_order_no LIKE 'cut-%' ORDER BY 1",
    )
    assert rows == [("cut-1", 2), ("cut-2", 1)]


@pytest.mark.parametrize("method", [NOTIFY, NOTIFY_BATCH], ids=["notify", "notify-batch"])
@pytest.mark.parametrize(
    ("fixture", "size", "code"),
    [
        ("server", MAX_MESSAGE_BYTES, grpc.StatusCode.INVALID_ARGUMENT),
        ("server", MAX_MESSAGE_BYTES + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("usual_server", DEFAULT_BYTES, grpc.StatusCode.INVALID_ARGUMENT),
        ("usual_server", DEFAULT_BYTES + 1, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("usual_server", 64_000_000, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["at-the-largest-limit", "above-it", "at-the-usual-limit", "above-the-usual-limit", "far-above-it"],
)
def test_64_megabytes_of_zeros_are_refused_and_the_server_serves_on(
    request: pytest.FixtureRequest, method: str, fixture: str, size: int, code: grpc.StatusCode
) -> None:
    server: ServerProcess = request.getfixturevalue(fixture)
    before, pid, words = facts.contents(server.db_path), server.pid, counted(server)
    with grpc.insecure_channel(server.address) as channel:
        error = send(channel, bytes(size), method)
        assert isinstance(error, PaycoreRpcError)
        assert error.code is code
        assert not error.retryable
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            assert error.reason == "MALFORMED_MESSAGE"
        assert (facts.contents(server.db_path), counted(server)) == (before, words)
        answer = send(channel, batch(word("after-zeros")))
        assert isinstance(answer, v1.NotifyBatchResponse)
        assert counted(server) == words + 1
    assert (server.pid, server.process.poll()) == (pid, None)
    assert "Traceback" not in server.log()
