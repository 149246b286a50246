"""The typed clients against a real server and a real bank: answers, reasons, and nothing written on refusal."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships stubs without py.typed

from paycore.client import NO_RETRY, PaycoreClient, PaycoreRpcError, RetryPolicy, notify_request
from paycore.client.aio import AsyncPaycoreClient
from paycore.client.errors import DETAILS_KEY, read_error
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.support.facts import contents, now_ms
from tests.support.server import ServerProcess
from tests.support.simbank import SECRETS, bank_process

Code = grpc.StatusCode


class Setting(NamedTuple):
    """A server with a bank behind it."""

    server: ServerProcess
    bank_url: str


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder: Path = tmp_path_factory.mktemp("client")
    # Nobody pays at the bank here, so it has nothing to forward.
    with bank_process(folder, "http://127.0.0.1:9/notifications") as bank:
        env = {"PAYCORE_SIMBANK_URL": bank.url, "PAYCORE_SIMBANK_SECRETS": str(SECRETS).replace("'", '"')}
        with ServerProcess(folder / "paycore.db", env=env) as server:
            yield Setting(server, bank.url)


@pytest.fixture
def client(setting: Setting) -> Iterator[PaycoreClient]:
    with PaycoreClient(setting.server.address) as connected:
        yield connected


_count = iter(range(1_000_000))


def terms(**changes: Any) -> dict[str, Any]:
    """A good call of Pay for an order of its own, with changes."""
    return {
        "merchant_id": "shop",
        "merchant_order_no": f"client-{next(_count)}",
        "amount_minor": 1_999,
        "currency": "CNY",
        "subject": "Tea",
        "channel": "simbank",
        "account": "bank_a",
        "method": payment_pb2.PAY_METHOD_REDIRECT,
        **changes,
    }


def word(order: payment_service_pb2.PayResponse, **changes: Any) -> dict[str, Any]:
    """A good notification about an attempt, with changes."""
    return {
        "channel": "simbank",
        "account": "bank_a",
        "channel_order_no": order.attempt.channel_order_no,
        "result": payment_pb2.CHANNEL_RESULT_SUCCESS,
        "amount_minor": 1_999,
        "currency": "CNY",
        "channel_trade_no": f"T-{order.attempt.channel_order_no}",
        "paid_at_ms": now_ms(),
        **changes,
    }


def test_payment_is_asked_for_paid_and_found_by_each_of_its_numbers(setting: Setting, client: PaycoreClient) -> None:
    asked = terms()
    paid_for = client.pay(**asked)
    assert paid_for.next_action == payment_service_pb2.PAY_NEXT_ACTION_REDIRECT
    assert paid_for.attempt.pay_url.startswith(setting.bank_url)
    notified = client.notify(**word(paid_for, raw=b"raw", headers={"b": "2", "a": "1"}))
    assert (notified.outcome, notified.replayed) == (payment_pb2.NOTIFY_OUTCOME_ACCEPTED, False)
    assert (notified.payment_id, notified.attempt) == (paid_for.payment_id, 1)
    found = [
        client.query(payment_id=paid_for.payment_id),
        client.query(merchant_id="shop", merchant_order_no=asked["merchant_order_no"]),
        client.query(channel_order_no=paid_for.attempt.channel_order_no),
    ]
    assert found[0].state == payment_pb2.PAYMENT_STATE_PAID
    assert found[0].outcome.channel_trade_no == f"T-{paid_for.attempt.channel_order_no}"
    assert found[0] == found[1] == found[2]


def test_same_call_of_pay_again_returns_the_same_attempt(client: PaycoreClient) -> None:
    asked = terms(method=payment_pb2.PAY_METHOD_QR)
    first, second = client.pay(**asked), client.pay(**asked)
    assert first == second
    assert first.next_action == payment_service_pb2.PAY_NEXT_ACTION_SHOW_QR
    assert first.attempt.qr_text
    assert first.attempt.pay_url == ""


def test_validity_is_a_duration_from_the_first_call(client: PaycoreClient) -> None:
    began_ms = now_ms()
    response = client.pay(**terms(validity_ms=90_500))
    assert began_ms + 90_500 <= response.expire_at.ToMilliseconds() <= now_ms() + 90_500
    assert response.attempt.expire_at == response.expire_at


def test_closed_payment_is_returned_again_and_takes_no_further_attempt(client: PaycoreClient) -> None:
    asked = terms()
    payment_id = client.pay(**asked).payment_id
    closed = client.close(payment_id=payment_id)
    assert closed.state == payment_pb2.PAYMENT_STATE_CLOSED
    assert closed.outcome.close_reason == payment_pb2.CLOSE_REASON_MERCHANT
    assert client.close(merchant_id="shop", merchant_order_no=asked["merchant_order_no"]) == closed
    with pytest.raises(PaycoreRpcError) as caught:
        client.pay(**asked)
    assert (caught.value.code, caught.value.reason) == (Code.FAILED_PRECONDITION, "PAYMENT_CLOSED")


def test_close_of_a_paid_payment_is_refused(client: PaycoreClient) -> None:
    order = client.pay(**terms())
    client.notify(**word(order))
    with pytest.raises(PaycoreRpcError) as caught:
        client.close(payment_id=order.payment_id)
    assert (caught.value.reason, caught.value.retryable) == ("PAYMENT_PAID", False)


def test_same_number_with_other_terms_names_the_fields(setting: Setting, client: PaycoreClient) -> None:
    asked = terms()
    client.pay(**asked)
    before = contents(setting.server.db_path)
    with pytest.raises(PaycoreRpcError) as caught:
        client.pay(**{**asked, "amount_minor": 2_000, "subject": "Coffee"})
    assert (caught.value.code, caught.value.reason) == (Code.ALREADY_EXISTS, "TERMS_DIFFER")
    assert caught.value.metadata["fields"] == "amount_minor, subject"
    assert contents(setting.server.db_path) == before


PAY_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("amount_minor", {"amount_minor": 0}),
    ("amount_minor", {"amount_minor": -1}),
    ("currency", {"currency": "cny"}),
    ("currency", {"currency": "XXX"}),
    ("currency", {"currency": ""}),
    ("merchant_id", {"merchant_id": ""}),
    ("merchant_order_no", {"merchant_order_no": ""}),
    ("merchant_order_no", {"merchant_order_no": "9" * 65}),
    ("merchant_order_no", {"merchant_order_no": "a\nb"}),
    ("merchant_order_no", {"merchant_order_no": "a\0b"}),
    ("subject", {"subject": "a\0b"}),
    ("subject", {"subject": "s" * 129}),
    ("return_url", {"return_url": "javascript:alert(1)"}),
    ("validity", {"validity_ms": 59_999}),
    ("validity", {"validity_ms": 15 * 86_400_000 + 1}),
    ("validity", {"validity_ms": -1}),
    ("channel", {"channel": "alipay"}),
    ("account", {"account": "bank_x"}),
    ("method", {"method": payment_pb2.PAY_METHOD_UNSPECIFIED}),
]


@pytest.mark.parametrize(("field", "changes"), PAY_REFUSED)
def test_pay_that_breaks_a_rule_names_the_field_and_writes_nothing(
    setting: Setting, client: PaycoreClient, field: str, changes: dict[str, Any]
) -> None:
    before = contents(setting.server.db_path)
    with pytest.raises(PaycoreRpcError) as caught:
        client.pay(**terms(**changes))
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert [one.field for one in caught.value.violations] == [field]
    assert all(one.rule for one in caught.value.violations)
    assert contents(setting.server.db_path) == before


Call = Callable[[PaycoreClient], object]

NOT_FOUND: list[Call] = [
    lambda client: client.query(payment_id=1),
    lambda client: client.query(merchant_id="shop", merchant_order_no="none"),
    lambda client: client.query(channel_order_no="101"),
    lambda client: client.close(payment_id=1),
    lambda client: client.close(merchant_id="shop", merchant_order_no="none"),
]


@pytest.mark.parametrize("call", NOT_FOUND)
def test_payment_that_is_not_there_is_not_found(client: PaycoreClient, call: Call) -> None:
    with pytest.raises(PaycoreRpcError) as caught:
        call(client)
    assert (caught.value.code, caught.value.reason) == (Code.NOT_FOUND, "PAYMENT_NOT_FOUND")


WRONG_KEYS: list[Call] = [
    lambda client: client.query(),
    lambda client: client.query(payment_id=1, channel_order_no="101"),
    lambda client: client.query(merchant_id="shop"),
    lambda client: client.close(merchant_order_no="1"),
    lambda client: client.close(payment_id=1, merchant_id="shop", merchant_order_no="1"),
    lambda client: client.pay(**terms(amount_minor=2**63)),
]


@pytest.mark.parametrize("call", WRONG_KEYS)
def test_values_that_no_request_can_hold_are_a_value_error(client: PaycoreClient, call: Call) -> None:
    with pytest.raises(ValueError, match=r".+"):
        call(client)


async def test_asyncio_client_answers_as_the_blocking_one(setting: Setting, client: PaycoreClient) -> None:
    async with AsyncPaycoreClient(setting.server.address) as asynchronous:
        order = await asynchronous.pay(**terms())
        notified = await asynchronous.notify(**word(order))
        assert notified.outcome == payment_pb2.NOTIFY_OUTCOME_ACCEPTED
        assert await asynchronous.query(payment_id=order.payment_id) == client.query(payment_id=order.payment_id)
        with pytest.raises(PaycoreRpcError) as caught:
            await asynchronous.close(payment_id=order.payment_id)
        assert caught.value.reason == "PAYMENT_PAID"


def a_free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def test_server_that_is_not_there_is_unavailable_and_retryable() -> None:
    with PaycoreClient(a_free_address(), retry=NO_RETRY) as client, pytest.raises(PaycoreRpcError) as caught:
        client.query(payment_id=1)
    assert (caught.value.code, caught.value.reason, caught.value.retryable) == (Code.UNAVAILABLE, "UNAVAILABLE", True)


def test_server_that_does_not_answer_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with PaycoreClient(address) as client, pytest.raises(PaycoreRpcError) as caught:
            client.query(payment_id=1, timeout_ms=200)
    assert caught.value.retryable
    assert caught.value.code is Code.DEADLINE_EXCEEDED


async def code_of_query(client: AsyncPaycoreClient) -> grpc.StatusCode:
    with pytest.raises(PaycoreRpcError) as caught:
        await client.query(payment_id=1)
    return caught.value.code


async def test_server_that_comes_back_is_found_by_the_same_client(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "paycore.db") as server:
        async with AsyncPaycoreClient(server.address, retry=NO_RETRY) as client:
            server.kill()
            assert await code_of_query(client) is Code.UNAVAILABLE
            await asyncio.to_thread(server.restart)
            async with asyncio.timeout(10):
                while await code_of_query(client) is Code.UNAVAILABLE:
                    pass
            assert await code_of_query(client) is Code.NOT_FOUND


# How a client is told to retry, and how often it calls a server that is not there.
ABSENT: list[tuple[RetryPolicy, int]] = [
    (NO_RETRY, 1),
    (RetryPolicy(initial_backoff_ms=1, max_backoff_ms=1, max_attempts=3), 3),
]


@pytest.mark.parametrize(("retry", "attempts"), ABSENT)
def test_call_is_made_as_often_as_the_policy_says(
    retry: RetryPolicy, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("paycore.client.sync.time.sleep", waits.append)
    with PaycoreClient(a_free_address(), retry=retry) as client, pytest.raises(PaycoreRpcError) as caught:
        client.query(payment_id=1)
    assert caught.value.code is Code.UNAVAILABLE
    assert len(waits) == attempts - 1


def test_server_that_comes_up_before_the_deadline_is_waited_for(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "paycore.db")
    server.address = a_free_address()
    with PaycoreClient(server.address, timeout_ms=20_000) as client, ThreadPoolExecutor(1) as caller:
        answer = caller.submit(client.query, payment_id=1)
        with server:
            error = answer.exception(20)
    assert isinstance(error, PaycoreRpcError)
    assert error.code is Code.NOT_FOUND


async def test_server_that_stays_away_fails_the_call_within_its_deadline_with_the_reason() -> None:
    began_ms = now_ms()
    async with AsyncPaycoreClient(a_free_address(), timeout_ms=400) as client:
        assert await code_of_query(client) is Code.UNAVAILABLE
    assert now_ms() - began_ms < 5_000


async def test_batch_is_answered_in_order_with_errors_as_values(client: PaycoreClient, setting: Setting) -> None:
    orders = [client.pay(**terms()) for _ in range(3)]
    words = [
        notify_request(**word(orders[0])),
        notify_request(**word(orders[1], amount_minor=0, channel_trade_no="")),
        notify_request(**word(orders[2])),
    ]
    first, invalid, third = client.notify_batch(words)
    assert isinstance(first, payment_service_pb2.NotifyResponse)
    assert isinstance(third, payment_service_pb2.NotifyResponse)
    assert [first.payment_id, third.payment_id] == [orders[0].payment_id, orders[2].payment_id]
    assert isinstance(invalid, PaycoreRpcError)
    with pytest.raises(PaycoreRpcError) as alone:
        client.notify(**word(orders[1], amount_minor=0, channel_trade_no=""))
    assert {one.field for one in invalid.violations} == {"amount_minor", "channel_trade_no"}
    assert (invalid.code, invalid.reason, invalid.violations) == (
        alone.value.code,
        alone.value.reason,
        alone.value.violations,
    )
    async with AsyncPaycoreClient(setting.server.address) as asynchronous:
        again = await asynchronous.notify_batch(words)
    assert [getattr(one, "replayed", None) for one in again] == [True, None, True]


@pytest.mark.parametrize("count", [0, 10_001])
def test_batch_of_no_word_and_of_too_many_is_refused_as_a_whole(client: PaycoreClient, count: int) -> None:
    word = notify_request(
        channel="x", account="y", channel_order_no="z", result=payment_pb2.CHANNEL_RESULT_FAILURE, amount_minor=0
    )
    with pytest.raises(PaycoreRpcError) as caught:
        client.notify_batch([word] * count)
    assert (caught.value.code, caught.value.reason) == (Code.INVALID_ARGUMENT, "INVALID_BATCH")


def details_of(*messages: Any) -> bytes:
    status = status_pb2.Status()
    for message in messages:
        status.details.add().Pack(message)
    data: bytes = status.SerializeToString()
    return data


INFO = error_details_pb2.ErrorInfo(reason="R", metadata={"retryable": "true", "attempt": "2"})

# Code, trailing metadata, then reason, retryability and metadata that are read from them.
ERRORS: list[tuple[grpc.StatusCode, Any, str, bool, dict[str, str]]] = [
    (Code.FAILED_PRECONDITION, ((DETAILS_KEY, details_of(INFO)),), "R", True, {"attempt": "2"}),
    (Code.UNAVAILABLE, ((DETAILS_KEY, details_of(error_details_pb2.ErrorInfo(reason="R"))),), "R", False, {}),
    (Code.UNAVAILABLE, None, "UNAVAILABLE", True, {}),
    (Code.DEADLINE_EXCEEDED, (), "DEADLINE_EXCEEDED", True, {}),
    (Code.RESOURCE_EXHAUSTED, (), "RESOURCE_EXHAUSTED", False, {}),
    (Code.UNIMPLEMENTED, (("other", "x"),), "UNIMPLEMENTED", False, {}),
    (Code.INTERNAL, ((DETAILS_KEY, b"\xff"),), "INTERNAL", False, {}),
]


@pytest.mark.parametrize(("code", "trailing", "reason", "retryable", "metadata"), ERRORS)
def test_error_is_read_from_the_status(
    code: grpc.StatusCode, trailing: Any, reason: str, retryable: bool, metadata: dict[str, str]
) -> None:
    error = read_error(code, "text", trailing)
    assert (error.code, error.reason, error.retryable, error.metadata) == (code, reason, retryable, metadata)
    assert str(error) == f"{reason}: text"


def test_delay_that_the_server_asks_for_is_read_from_the_status() -> None:
    asked = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    assert read_error(Code.UNAVAILABLE, "", ((DETAILS_KEY, details_of(INFO, asked)),)).retry_after_ms == 1_500
    assert read_error(Code.UNAVAILABLE, "", ((DETAILS_KEY, details_of(INFO)),)).retry_after_ms is None
