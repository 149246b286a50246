"""The forwarder between a bank and paycore: real processes, and a gRPC server that answers as it is told."""

import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from pydantic import SecretStr

from paycore.channels.simbank import SimbankChannel
from paycore.simbank.signing import sign
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.support.simbank import CLOCK, SECRETS, Driver, Running, adapter, an_order, bank_process, running, wait_for

_numbers = itertools.count(3_000_000)

Answer = Callable[[grpc.ServicerContext], payment_service_pb2.NotifyResponse]


def accepted(_: grpc.ServicerContext) -> payment_service_pb2.NotifyResponse:
    return payment_service_pb2.NotifyResponse(outcome=payment_pb2.NOTIFY_OUTCOME_ACCEPTED)


def failing(code: grpc.StatusCode) -> Answer:
    def fail(context: grpc.ServicerContext) -> payment_service_pb2.NotifyResponse:
        context.abort(code, "as told")

    return fail


class Paycore:
    """Serves Notify alone: keeps what it was called with and answers as ``answer`` says."""

    def __init__(self) -> None:
        self.notified: list[payment_service_pb2.NotifyRequest] = []
        self.answer: Answer = accepted
        self.port = 0

    def notify(
        self, request: payment_service_pb2.NotifyRequest, context: grpc.ServicerContext
    ) -> payment_service_pb2.NotifyResponse:
        self.notified.append(request)
        return self.answer(context)

    def of_order(self, order_no: str) -> list[payment_service_pb2.NotifyRequest]:
        return [one for one in list(self.notified) if one.channel_order_no == order_no]

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        server = grpc.server(ThreadPoolExecutor(4))
        notify = grpc.unary_unary_rpc_method_handler(
            self.notify,
            payment_service_pb2.NotifyRequest.FromString,
            payment_service_pb2.NotifyResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("paycore.v1.PaymentService", {"Notify": notify})
        server.add_generic_rpc_handlers((service,))
        self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        yield
        server.stop(0).wait()


@pytest.fixture(scope="module")
def paycore() -> Iterator[Paycore]:
    paycore = Paycore()
    with paycore.serving():
        yield paycore


@pytest.fixture(scope="module")
def forwarder(tmp_path_factory: pytest.TempPathFactory, paycore: Paycore) -> Iterator[Running]:
    flags = ("--listen", "127.0.0.1:0", "--server", f"127.0.0.1:{paycore.port}", "--notify-timeout-ms", "500")
    with running("forwarder", tmp_path_factory.mktemp("forwarder"), *flags) as forwarder:
        yield forwarder


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, forwarder: Running) -> Iterator[Running]:
    ladder = ("--ladder-ms", ",".join(["100"] * 100))
    with bank_process(tmp_path_factory.mktemp("bank"), f"{forwarder.url}/notifications", *ladder) as bank:
        yield bank


@pytest.fixture(scope="module")
def driver(bank: Running) -> Iterator[Driver]:
    with Driver(bank.url) as driver:
        yield driver


@pytest.fixture
def order_no(paycore: Paycore) -> Iterator[str]:
    """A number that no other test uses; paycore accepts again afterwards."""
    yield str(next(_numbers))
    paycore.answer = accepted


async def paid(bank: Running, driver: Driver, order_no: str) -> dict[str, Any]:
    channel: SimbankChannel = adapter(bank.url)
    await channel.create(an_order(order_no))
    await channel.aclose()
    capture: dict[str, Any] = driver.pay(order_no)["captures"][0]
    return capture


def told(order_no: str, **change: object) -> bytes:
    notification = {
        "notification_id": "N1",
        "bank": "bank_a",
        "result": "SUCCESS",
        "order_no": order_no,
        "trade_no": "T1",
        "amount_minor": 1234,
        "currency": "CNY",
        "paid_at_ms": 1_800_000_000_123,
    }
    return json.dumps(notification | change).encode()


def send(forwarder: Running, body: bytes, secret: str = SECRETS["bank_a"], now_ms: int | None = None) -> httpx.Response:
    now_ms = CLOCK.now_ms() if now_ms is None else now_ms
    headers = sign(SecretStr(secret), "POST /notifications/bank_a", body, now_ms)
    return httpx.post(f"{forwarder.url}/notifications/bank_a", content=body, headers=headers, trust_env=False)


# What is forwarded


async def test_notification_of_a_payment_reaches_notify_whole(
    paycore: Paycore, bank: Running, driver: Driver, order_no: str
) -> None:
    capture = await paid(bank, driver, order_no)
    driver.settled(order_no)
    (request,) = paycore.of_order(order_no)
    assert (request.channel, request.account) == ("simbank", "bank_a")
    assert request.result == payment_pb2.CHANNEL_RESULT_SUCCESS
    assert (request.amount_minor, request.currency) == (1234, "CNY")
    assert request.channel_trade_no == capture["trade_no"]
    assert request.paid_at.ToMilliseconds() == capture["paid_at_ms"]
    assert json.loads(request.raw)["trade_no"] == capture["trade_no"]
    assert {"simbank-timestamp", "simbank-nonce", "simbank-signature"} <= request.headers.keys()


def test_failure_is_forwarded_without_a_pay_time(paycore: Paycore, forwarder: Running, order_no: str) -> None:
    body = told(order_no, result="FAILURE", trade_no="", paid_at_ms=None)
    answer = send(forwarder, body)
    assert (answer.status_code, answer.json()) == (200, {"code": "OK"})
    (request,) = paycore.of_order(order_no)
    assert request.result == payment_pb2.CHANNEL_RESULT_FAILURE
    assert not request.HasField("paid_at")
    assert request.raw == body


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("amount_minor", 0),
        ("amount_minor", -(2**63)),
        ("amount_minor", 2**63 - 1),
        ("currency", "yuan"),
        ("trade_no", "\x00"),
        ("paid_at_ms", -1),
        ("paid_at_ms", 2**63 - 1),
        ("unheard_of", [1]),
    ],
)
def test_odd_values_are_left_for_paycore_to_judge(
    paycore: Paycore, forwarder: Running, order_no: str, field: str, value: object
) -> None:
    assert send(forwarder, told(order_no, **{field: value})).status_code == 200
    (request,) = paycore.of_order(order_no)
    if field == "paid_at_ms":
        assert isinstance(value, int)
        assert request.paid_at.seconds * 1000 + request.paid_at.nanos // 1_000_000 == value
    elif field in {"amount_minor", "currency"}:
        assert getattr(request, field) == value


# What the bank is answered


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 400),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 503),
        (grpc.StatusCode.UNAVAILABLE, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 503),
        (grpc.StatusCode.INTERNAL, 503),
        (grpc.StatusCode.UNKNOWN, 503),
        (grpc.StatusCode.UNIMPLEMENTED, 503),
        (grpc.StatusCode.UNAUTHENTICATED, 503),
        (grpc.StatusCode.NOT_FOUND, 503),
    ],
)
def test_status_of_notify_decides_the_answer(
    paycore: Paycore, forwarder: Running, order_no: str, code: grpc.StatusCode, status: int
) -> None:
    paycore.answer = failing(code)
    assert send(forwarder, told(order_no)).status_code == status


def test_notify_that_does_not_answer_in_time_is_503(paycore: Paycore, forwarder: Running, order_no: str) -> None:
    go_on = threading.Event()

    def wait(context: grpc.ServicerContext) -> payment_service_pb2.NotifyResponse:
        go_on.wait(20)
        return accepted(context)

    paycore.answer = wait
    assert send(forwarder, told(order_no)).status_code == 503
    go_on.set()


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE])
async def test_notification_that_notify_did_not_take_is_sent_again(
    paycore: Paycore, bank: Running, driver: Driver, order_no: str, code: grpc.StatusCode
) -> None:
    paycore.answer = failing(code)
    await paid(bank, driver, order_no)
    wait_for(lambda: len(paycore.of_order(order_no)) >= 2, "the bank has sent again")
    assert not driver.order(order_no)["notifications"][0]["acknowledged"]
    paycore.answer = accepted
    driver.settled(order_no)


async def test_server_that_comes_back_is_found_again(tmp_path: Path) -> None:
    paycore = Paycore()
    with paycore.serving():
        pass
    flags = ("--listen", "127.0.0.1:0", "--server", f"127.0.0.1:{paycore.port}")
    with running("forwarder", tmp_path, *flags) as forwarder:
        assert send(forwarder, told("1")).status_code == 503
        with paycore.serving():
            answered = wait_for(lambda: send(forwarder, told("1")).status_code == 200, "paycore is found", 10)
    assert answered
    assert len(paycore.of_order("1")) == 1


# What is refused


@pytest.mark.parametrize(
    ("secret", "age_ms", "code"),
    [
        (SECRETS["bank_b"], 0, "SIGNATURE_WRONG"),
        ("", 0, "SIGNATURE_WRONG"),
        (SECRETS["bank_a"], 301_000, "SIGNATURE_EXPIRED"),
        (SECRETS["bank_a"], -301_000, "SIGNATURE_EXPIRED"),
    ],
)
def test_forged_or_expired_notification_is_not_forwarded(
    paycore: Paycore, forwarder: Running, order_no: str, secret: str, age_ms: int, code: str
) -> None:
    answer = send(forwarder, told(order_no), secret, CLOCK.now_ms() - age_ms)
    assert (answer.status_code, answer.json()["code"]) == (401, code)
    assert paycore.of_order(order_no) == []


def test_notification_replayed_byte_for_byte_is_not_forwarded(
    paycore: Paycore, forwarder: Running, order_no: str
) -> None:
    body, url = told(order_no), f"{forwarder.url}/notifications/bank_a"
    headers = sign(SecretStr(SECRETS["bank_a"]), "POST /notifications/bank_a", body, CLOCK.now_ms())
    answers = [httpx.post(url, content=body, headers=headers, trust_env=False) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 401]
    assert answers[1].json()["code"] == "SIGNATURE_REPLAYED"
    assert len(paycore.of_order(order_no)) == 1


def test_notification_changed_on_its_way_is_not_forwarded(paycore: Paycore, forwarder: Running, order_no: str) -> None:
    headers = sign(SecretStr(SECRETS["bank_a"]), "POST /notifications/bank_a", told(order_no), CLOCK.now_ms())
    url, changed = f"{forwarder.url}/notifications/bank_a", told(order_no, amount_minor=1)
    assert httpx.post(url, content=changed, headers=headers, trust_env=False).status_code == 401
    assert paycore.of_order(order_no) == []


@pytest.mark.parametrize(
    "change",
    [
        {"bank": "bank_b"},
        {"bank": None},
        {"result": "PERHAPS"},
        {"amount_minor": 1234.0},
        {"amount_minor": "1234"},
        {"amount_minor": True},
        {"amount_minor": 2**63},
        {"paid_at_ms": "now"},
        {"trade_no": 1},
    ],
)
def test_notification_of_the_wrong_shape_is_neither_forwarded_nor_acknowledged(
    paycore: Paycore, forwarder: Running, order_no: str, change: dict[str, Any]
) -> None:
    before = len(paycore.notified)
    assert send(forwarder, told(order_no, **change)).status_code == 400
    assert len(paycore.notified) == before


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"order_no": "\\ud800"}'])
def test_notification_that_is_no_json_is_refused(forwarder: Running, body: bytes) -> None:
    assert send(forwarder, body).status_code == 400


def test_notification_over_the_size_limit_is_refused(forwarder: Running) -> None:
    assert send(forwarder, b" " * 65_537).status_code == 413


def test_unknown_bank_is_refused(forwarder: Running) -> None:
    answer = httpx.post(f"{forwarder.url}/notifications/bank_z", content=told("1"), trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (401, "UNKNOWN_BANK")


def test_log_shows_refusals_and_no_secret(forwarder: Running) -> None:
    send(forwarder, told("1"), SECRETS["bank_b"])
    log = forwarder.log.read_text()
    assert "notification_refused" in log
    assert not [secret for secret in SECRETS.values() if secret in log]


def test_forwarder_stops_cleanly_on_sigterm(tmp_path: Path) -> None:
    with running("forwarder", tmp_path, "--listen", "127.0.0.1:0", "--server", "127.0.0.1:1") as forwarder:
        os.kill(forwarder.process.pid, signal.SIGTERM)
        assert forwarder.process.wait(timeout=20) == 0
