"""The adapter against answers that no bank should give: whatever is not exactly an answer is unknown."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from paycore.channels.protocol import (
    Capture,
    Channel,
    ChannelUnknownError,
    CloseResult,
    Created,
    CreateResult,
    Queried,
    QueryState,
    RefundAnswer,
    Refunded,
)
from paycore.channels.simbank import MAX_ANSWER_BYTES, SimbankChannel
from paycore.domain.verdicts import PayMethod
from tests.support.simbank import CLOCK, Receiver, a_refund, adapter, an_order

TIMEOUT_MS = 5_000

CAPTURE = {"trade_no": "T1", "amount_minor": 1234, "currency": "CNY", "paid_at_ms": 1_800_000_000_000}
QUERIED: dict[str, Any] = {"order_no": "1001", "state": "PAID", "code": "", "captures": [CAPTURE]}
CREATED: dict[str, Any] = {
    "order_no": "1001",
    "result": "OPEN",
    "pay_url": "http://127.0.0.1:1/pay",
    "qr_text": "",
    "capture": None,
    "code": "",
}
REFUNDED: dict[str, Any] = {
    "refund_no": "R1",
    "order_no": "1001",
    "trade_no": "T1",
    "amount_minor": 1234,
    "currency": "CNY",
    "result": "REFUNDED",
    "code": "",
}
ORDER, REFUND = an_order("1001"), a_refund("R1", "1001", "T1")
CHARGE, SCAN = ORDER._replace(method=PayMethod.CHARGE), ORDER._replace(method=PayMethod.QR)


@pytest.fixture(scope="module")
def bank() -> Iterator[Receiver]:
    bank = Receiver()
    yield bank
    bank.close()


@pytest.fixture
async def channel(bank: Receiver) -> AsyncIterator[Channel]:
    channel = adapter(bank.url, TIMEOUT_MS)
    yield channel
    await channel.aclose()


def says(bank: Receiver, body: object, status: int = 200) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    bank.answer = lambda _: (status, content)


# What is believed


@pytest.mark.parametrize(
    ("order", "change", "created"),
    [
        (ORDER, {}, Created(CreateResult.OPEN, pay_url="http://127.0.0.1:1/pay")),
        (
            SCAN,
            {"pay_url": "", "qr_text": "https://bank.test/q"},
            Created(CreateResult.OPEN, qr_text="https://bank.test/q"),
        ),
        (
            CHARGE,
            {"result": "PAID", "capture": CAPTURE},
            Created(CreateResult.PAID, capture=Capture("T1", 1234, "CNY", 1_800_000_000_000)),
        ),
        (CHARGE, {"result": "ACCEPTED"}, Created(CreateResult.ACCEPTED)),
        (
            CHARGE,
            {"result": "REFUSED", "code": "NO_CREDIT"},
            Created(CreateResult.REFUSED, code="NO_CREDIT", message="the bank refused the order"),
        ),
        (
            ORDER,
            {"result": "REFUSED", "code": "EXPIRED"},
            Created(CreateResult.REFUSED, code="EXPIRED", message="the bank refused the order"),
        ),
        (ORDER, {"more": "than documented"}, Created(CreateResult.OPEN, pay_url="http://127.0.0.1:1/pay")),
    ],
)
async def test_create_documented_answer_is_translated(
    bank: Receiver, channel: Channel, order: Any, change: dict[str, Any], created: Created
) -> None:
    says(bank, CREATED | change)
    assert await channel.create(order) == created


@pytest.mark.parametrize(
    ("change", "queried"),
    [
        ({}, Queried(QueryState.PAID, (Capture("T1", 1234, "CNY", 1_800_000_000_000),))),
        ({"captures": [CAPTURE | {"paid_at_ms": None}]}, Queried(QueryState.PAID, (Capture("T1", 1234, "CNY", None),))),
        ({"captures": [CAPTURE | {"amount_minor": 1, "currency": "USD"}]}, None),
        ({"state": "CLOSED"}, Queried(QueryState.CLOSED, (Capture("T1", 1234, "CNY", 1_800_000_000_000),))),
        ({"state": "NOT_PAID", "captures": []}, Queried(QueryState.NOT_PAID)),
        ({"state": "IN_PROGRESS", "captures": []}, Queried(QueryState.IN_PROGRESS)),
        ({"state": "FAILED", "captures": [], "code": "NO"}, Queried(QueryState.FAILED, code="NO")),
    ],
)
async def test_query_documented_answer_is_translated_and_money_is_never_judged(
    bank: Receiver, channel: Channel, change: dict[str, Any], queried: Queried | None
) -> None:
    says(bank, QUERIED | change)
    expected = queried or Queried(QueryState.PAID, (Capture("T1", 1, "USD", 1_800_000_000_000),))
    assert await channel.query("bank_a", "1001") == expected


@pytest.mark.parametrize("result", [CloseResult.CLOSED, CloseResult.ALREADY_PAID, CloseResult.IN_PROGRESS])
async def test_close_documented_answer_is_translated(bank: Receiver, channel: Channel, result: CloseResult) -> None:
    says(bank, {"order_no": "1001", "result": result.name})
    assert await channel.close("bank_a", "1001") is result


@pytest.mark.parametrize("answer", [RefundAnswer.REFUNDED, RefundAnswer.ACCEPTED])
async def test_refund_documented_answer_is_translated(bank: Receiver, channel: Channel, answer: RefundAnswer) -> None:
    says(bank, REFUNDED | {"result": answer.name})
    assert await channel.refund(REFUND) == Refunded(answer)
    assert await channel.query_refund(REFUND) == Refunded(answer)


async def test_not_exist_is_believed_where_a_number_was_looked_up(bank: Receiver, channel: Channel) -> None:
    says(bank, {"code": "NOT_EXIST", "message": "", "number": "1001"}, 404)
    assert await channel.query("bank_a", "1001") == Queried(QueryState.NOT_EXIST)
    assert await channel.close("bank_a", "1001") is CloseResult.NOT_EXIST
    says(bank, {"code": "NOT_EXIST", "message": "", "number": "R1"}, 404)
    assert await channel.query_refund(REFUND) == Refunded(RefundAnswer.NOT_EXIST)
    with pytest.raises(ChannelUnknownError):
        await channel.refund(REFUND)
    with pytest.raises(ChannelUnknownError):
        await channel.create(ORDER)


# What is not believed

ANY_CALL_NONSENSE: list[tuple[int, bytes]] = [
    *((status, json.dumps(CREATED | QUERIED | REFUNDED).encode()) for status in (201, 204, 302, 400, 401, 409, 500)),
    (503, b""),
    (404, b""),
    (404, b"{}"),
    (404, b'{"code":"UNKNOWN_BANK"}'),
    (404, b'{"code":"NOT_EXIST"}'),
    (404, b'{"code":"NOT_EXIST","number":"1002"}'),
    (404, b'{"code":["NOT_EXIST"],"number":"1001"}'),
    (404, b"<html>Not Found</html>"),
    (200, b""),
    (200, b"null"),
    (200, b"[]"),
    (200, b'"OK"'),
    (200, b"{}"),
    (200, b"{" * 100_000),
    (200, b"[" * 100_000),
    (200, b"\xff\xfe"),
    (200, b'{"order_no": 1' + b"0" * 5_000 + b"}"),
    (200, b'{"order_no":"1001","refund_no":"R1","result":"CLOSED","result":"CLOSED"}'),
    (200, b'{"filler":"' + b" " * MAX_ANSWER_BYTES + b'"}'),
]


@pytest.mark.parametrize(("status", "body"), ANY_CALL_NONSENSE)
async def test_answer_that_is_no_answer_is_unknown_to_every_call(
    bank: Receiver, channel: Channel, status: int, body: bytes
) -> None:
    says(bank, body, status)
    calls = [
        channel.create(CHARGE),
        channel.create(ORDER),
        channel.query("bank_a", "1001"),
        channel.close("bank_a", "1001"),
        channel.refund(REFUND),
        channel.query_refund(REFUND),
    ]
    for call in calls:
        with pytest.raises(ChannelUnknownError):
            await call


CREATE_NONSENSE: list[tuple[Any, dict[str, Any]]] = [
    (ORDER, {"order_no": "1002"}),
    (ORDER, {"order_no": 1001}),
    (ORDER, {"result": "open"}),
    (ORDER, {"result": None}),
    (ORDER, {"result": ["OPEN"]}),
    (ORDER, {"result": "PAID", "capture": CAPTURE}),
    (ORDER, {"result": "ACCEPTED"}),
    (ORDER, {"pay_url": ""}),
    (ORDER, {"pay_url": "javascript:alert(1)"}),
    (ORDER, {"pay_url": "/pay"}),
    (ORDER, {"pay_url": "http://["}),
    (ORDER, {"pay_url": "http://bank.test/a b"}),
    (ORDER, {"pay_url": "http://bank.test/" + "a" * 2048}),
    (ORDER, {"result": "REFUSED"}),
    (ORDER, {"result": "REFUSED", "code": "X" * 65}),
    (ORDER, {"result": "REFUSED", "code": "A\nB"}),
    (SCAN, {}),
    (CHARGE, {}),
    (CHARGE, {"result": "PAID"}),
    (CHARGE, {"result": "PAID", "capture": [CAPTURE]}),
]


@pytest.mark.parametrize(("order", "change"), CREATE_NONSENSE)
async def test_create_nonsense_is_unknown(bank: Receiver, channel: Channel, order: Any, change: dict[str, Any]) -> None:
    says(bank, CREATED | change)
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.create(order)


CAPTURE_NONSENSE: list[dict[str, Any]] = [
    {"trade_no": ""},
    {"trade_no": "T 1"},
    {"trade_no": "T\x001"},
    {"trade_no": "T" * 65},
    {"trade_no": "Ｔ１"},
    {"trade_no": 1},
    {"trade_no": None},
    {"amount_minor": 0},
    {"amount_minor": -1},
    {"amount_minor": 2**63},
    {"amount_minor": 1234.0},
    {"amount_minor": "1234"},
    {"amount_minor": True},
    {"amount_minor": None},
    {"currency": "cny"},
    {"currency": "CN"},
    {"currency": None},
    {"paid_at_ms": "2026-11-23"},
    {"paid_at_ms": -1},
    {"paid_at_ms": 1.5},
    {"paid_at_ms": False},
    {"paid_at_ms": 2**63},
]


@pytest.mark.parametrize("change", CAPTURE_NONSENSE)
async def test_capture_nonsense_is_unknown(bank: Receiver, channel: Channel, change: dict[str, Any]) -> None:
    capture = CAPTURE | change
    says(bank, QUERIED | {"captures": [capture]})
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.query("bank_a", "1001")
    says(bank, CREATED | {"result": "PAID", "capture": capture})
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.create(CHARGE)


@pytest.mark.parametrize("missing", list(CAPTURE))
async def test_capture_without_a_field_is_unknown(bank: Receiver, channel: Channel, missing: str) -> None:
    says(bank, QUERIED | {"captures": [{name: value for name, value in CAPTURE.items() if name != missing}]})
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.query("bank_a", "1001")


@pytest.mark.parametrize(
    "change",
    [
        {"order_no": "1002"},
        {"state": "SUCCESS"},
        {"state": "NOT_EXIST"},
        {"state": 3},
        {"captures": []},
        {"captures": None},
        {"captures": CAPTURE},
        {"captures": [None]},
        {"captures": [CAPTURE, CAPTURE]},
        {"code": None},
    ],
)
async def test_query_nonsense_is_unknown(bank: Receiver, channel: Channel, change: dict[str, Any]) -> None:
    says(bank, QUERIED | change)
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.query("bank_a", "1001")


@pytest.mark.parametrize("missing", list(QUERIED))
async def test_query_without_a_field_is_unknown(bank: Receiver, channel: Channel, missing: str) -> None:
    says(bank, {name: value for name, value in QUERIED.items() if name != missing})
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.query("bank_a", "1001")


@pytest.mark.parametrize(
    "answer",
    [
        {"order_no": "1002", "result": "CLOSED"},
        {"result": "CLOSED"},
        {"order_no": "1001", "result": "NOT_EXIST"},
        {"order_no": "1001", "result": "closed"},
        {"order_no": "1001"},
    ],
)
async def test_close_nonsense_is_unknown(bank: Receiver, channel: Channel, answer: dict[str, Any]) -> None:
    says(bank, answer)
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await channel.close("bank_a", "1001")


@pytest.mark.parametrize(
    "change",
    [
        {"refund_no": "R2"},
        {"order_no": "1002"},
        {"trade_no": "T2"},
        {"amount_minor": 1235},
        {"amount_minor": 1234.0},
        {"currency": "USD"},
        {"result": "NOT_EXIST"},
        {"result": "SUCCESS"},
        {"result": "REFUSED"},
    ],
)
async def test_refund_nonsense_is_unknown(bank: Receiver, channel: Channel, change: dict[str, Any]) -> None:
    says(bank, REFUNDED | change)
    for call in [channel.refund(REFUND), channel.query_refund(REFUND)]:
        with pytest.raises(ChannelUnknownError, match="nonsense"):
            await call


# No answer


async def test_bank_that_hangs_up_is_unknown(bank: Receiver, channel: Channel) -> None:
    bank.answer = lambda _: None
    with pytest.raises(ChannelUnknownError):
        await channel.query("bank_a", "1001")


async def test_bank_that_is_not_there_is_unknown() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        channel = adapter(f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ChannelUnknownError, match="ConnectError"):
            await channel.query("bank_a", "1001")
        await channel.aclose()


async def test_bank_that_dribbles_is_bounded_by_the_timeout_as_a_whole() -> None:
    """Each byte comes in time and the answer as a whole does not."""

    hung_up = asyncio.Event()

    async def dribble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not reader.at_eof() and not writer.is_closing():
            writer.write(b" ")
            with contextlib.suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(1), 0.02)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        hung_up.set()

    async with await asyncio.start_server(dribble, "127.0.0.1", 0) as server:
        channel = adapter(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 300)
        before_ms = CLOCK.now_ms()
        with pytest.raises(ChannelUnknownError, match="no answer in time"):
            await channel.query("bank_a", "1001")
        assert CLOCK.now_ms() - before_ms < 5_000
        await channel.aclose()
        await asyncio.wait_for(hung_up.wait(), 10)


async def test_account_without_a_secret_is_unknown_and_asks_nobody(bank: Receiver) -> None:
    channel, before = SimbankChannel(bank.url, {}, TIMEOUT_MS, CLOCK), len(bank.received)
    with pytest.raises(ChannelUnknownError, match="no secret is configured for account bank_a"):
        await channel.query("bank_a", "1001")
    assert len(bank.received) == before
    await channel.aclose()


async def test_error_messages_show_no_secret_and_nothing_that_the_bank_sent(bank: Receiver, channel: Channel) -> None:
    says(bank, QUERIED | {"order_no": "a secret of bank_a for tests"})
    with pytest.raises(ChannelUnknownError) as unknown:
        await channel.query("bank_a", "1001")
    assert "secret" not in str(unknown.value)


async def test_same_order_is_sent_identically_each_time(bank: Receiver, channel: Channel) -> None:
    says(bank, CREATED)
    before = len(bank.received)
    for _ in range(2):
        await channel.create(ORDER)
    first, second = bank.received[before:]
    assert (first.path, first.raw) == (second.path, second.raw)
    assert first.headers["simbank-nonce"] != second.headers["simbank-nonce"]


async def test_number_with_odd_characters_stays_within_its_path(bank: Receiver, channel: Channel) -> None:
    says(bank, {"code": "NOT_EXIST", "number": "../x?y#z"}, 404)
    assert (await channel.query("bank_a", "../x?y#z")).state is QueryState.NOT_EXIST
    assert bank.received[-1].path == "/banks/bank_a/orders/..%2Fx%3Fy%23z"
