"""The simulated banks over real sockets: a merchant's adapter, a user's page, and every fault between them."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from paycore.channels.protocol import (
    ChannelOrder,
    ChannelUnknownError,
    CloseResult,
    CreateResult,
    QueryState,
    RefundAnswer,
    Refunded,
    RefundOrder,
)
from paycore.channels.simbank import SimbankChannel
from paycore.domain.verdicts import PayMethod
from tests.support.simbank import (
    CLOCK,
    SECRETS,
    Driver,
    Receiver,
    Running,
    a_refund,
    adapter,
    an_order,
    bank_process,
    wait_for,
)

OPERATIONS = ("create", "query", "close", "refund", "query_refund")
HANG_TIMEOUT_MS = 300

_numbers = itertools.count(1_000_000)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Running]:
    with bank_process(tmp_path_factory.mktemp("bank"), f"{receiver.url}/notifications") as bank:
        yield bank


@pytest.fixture(scope="module")
def driver(bank: Running) -> Iterator[Driver]:
    with Driver(bank.url) as driver:
        yield driver


@pytest.fixture
async def channel(bank: Running) -> AsyncIterator[SimbankChannel]:
    channel = adapter(bank.url)
    yield channel
    await channel.aclose()


@pytest.fixture
async def hasty(bank: Running) -> AsyncIterator[SimbankChannel]:
    """An adapter that does not wait long."""
    channel = adapter(bank.url, HANG_TIMEOUT_MS)
    yield channel
    await channel.aclose()


@pytest.fixture
def order_no() -> str:
    """A number that no other test uses."""
    return str(next(_numbers))


async def paid_order(channel: SimbankChannel, driver: Driver, order_no: str) -> str:
    """Open an order, pay it, and return the trade number."""
    await channel.create(an_order(order_no))
    trade_no: str = driver.pay(order_no)["captures"][0]["trade_no"]
    return trade_no


# Orders


async def test_redirect_order_paid_on_its_page_is_paid(
    channel: SimbankChannel, driver: Driver, bank: Running, order_no: str
) -> None:
    created = await channel.create(an_order(order_no))
    assert created.result is CreateResult.OPEN
    assert created.pay_url == f"{bank.url}/banks/bank_a/pay/{order_no}"
    assert (await channel.query("bank_a", order_no)).state is QueryState.NOT_PAID

    before_ms = CLOCK.now_ms()
    assert driver.press(created.pay_url).status_code == 200
    queried = await channel.query("bank_a", order_no)
    (capture,) = queried.captures
    assert queried.state is QueryState.PAID
    assert (capture.amount_minor, capture.currency) == (1234, "CNY")
    assert capture.paid_at_ms is not None
    assert before_ms <= capture.paid_at_ms <= CLOCK.now_ms()
    assert driver.order(order_no)["kept_minor"] == 1234


async def test_qr_order_hands_out_the_page_as_text(
    channel: SimbankChannel, driver: Driver, bank: Running, order_no: str
) -> None:
    created = await channel.create(an_order(order_no, method=PayMethod.QR))
    assert (created.pay_url, created.qr_text) == ("", f"{bank.url}/banks/bank_a/pay/{order_no}")
    page = driver.see(created.qr_text).text
    assert "<svg" in page
    assert "viewBox" in page


async def test_page_shows_subject_and_amount_and_trusts_no_text(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    created = await channel.create(an_order(order_no, subject="<script>alert(1)</script>", currency="KWD"))
    answer = driver.see(created.pay_url)
    assert "1.234 <span>KWD</span>" in answer.text
    assert "&lt;script&gt;alert(1)" in answer.text
    assert "<script>" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]


async def test_page_with_return_url_sends_the_user_back(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    back = "https://shop.test/back?order=1"
    created = await channel.create(an_order(order_no, return_url=back))
    answer = driver.press(created.pay_url)
    assert (answer.status_code, answer.headers["location"]) == (303, back)


async def test_page_of_a_paid_order_takes_no_money_again(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    created = await channel.create(an_order(order_no))
    answers = [driver.press(created.pay_url).status_code for _ in range(2)]
    assert answers == [200, 409]
    assert "This order is paid" in driver.see(created.pay_url).text
    assert len(driver.order(order_no)["captures"]) == 1


async def test_page_pressed_by_many_at_once_takes_money_once(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    created = await channel.create(an_order(order_no))
    async with httpx.AsyncClient(trust_env=False) as http:
        answers = await asyncio.gather(*(http.post(created.pay_url) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    assert driver.order(order_no)["kept_minor"] == 1234


def test_page_of_an_unknown_order_says_so(bank: Running) -> None:
    for method in ("GET", "POST"):
        assert httpx.request(method, f"{bank.url}/banks/bank_a/pay/404", trust_env=False).status_code == 404
    assert httpx.get(f"{bank.url}/banks/bank_z/pay/404", trust_env=False).json()["code"] == "UNKNOWN_BANK"


async def test_charge_is_paid_at_once_and_only_once(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    order = an_order(order_no, method=PayMethod.CHARGE)
    answers = [await channel.create(order) for _ in range(3)]
    assert answers[0].result is CreateResult.PAID
    assert answers[0].capture is not None
    assert answers == [answers[0]] * 3
    assert driver.order(order_no)["kept_minor"] == 1234


async def test_create_again_with_the_same_terms_gives_the_same_answer(channel: SimbankChannel, order_no: str) -> None:
    order = an_order(order_no)
    assert await channel.create(order) == await channel.create(order)


async def test_create_again_with_other_terms_is_a_conflict_and_changes_nothing(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    order = an_order(order_no)
    await channel.create(order)
    with pytest.raises(ChannelUnknownError, match="status 409"):
        await channel.create(order._replace(amount_minor=1))
    assert driver.order(order_no)["amount_minor"] == 1234


async def test_create_past_expiry_is_refused_for_good(channel: SimbankChannel, order_no: str) -> None:
    order = an_order(order_no, expire_at_ms=CLOCK.now_ms())
    assert [(await channel.create(order)).code for _ in range(2)] == ["EXPIRED"] * 2
    assert (await channel.query("bank_a", order_no)).state is QueryState.FAILED


async def test_expired_order_stays_not_paid_until_it_is_closed(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    order = an_order(order_no, expire_at_ms=CLOCK.now_ms() + 200)
    await channel.create(order)
    wait_for(lambda: CLOCK.now_ms() >= order.expire_at_ms, "the order has expired")
    assert driver.pay(order_no) == {"order_no": order_no, "result": "REFUSED", "code": "EXPIRED", "captures": []}
    assert (await channel.query("bank_a", order_no)).state is QueryState.NOT_PAID
    assert await channel.close("bank_a", order_no) is CloseResult.CLOSED
    assert (await channel.query("bank_a", order_no)).state is QueryState.CLOSED


async def test_close_makes_an_order_unpayable_and_may_be_repeated(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    await channel.create(an_order(order_no))
    assert [await channel.close("bank_a", order_no) for _ in range(2)] == [CloseResult.CLOSED] * 2
    assert driver.pay(order_no)["code"] == "CLOSED"
    assert driver.order(order_no)["captures"] == []


async def test_close_of_a_paid_order_says_so(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    await paid_order(channel, driver, order_no)
    assert await channel.close("bank_a", order_no) is CloseResult.ALREADY_PAID
    assert (await channel.query("bank_a", order_no)).state is QueryState.PAID


async def test_unknown_order_does_not_exist(channel: SimbankChannel, order_no: str) -> None:
    assert (await channel.query("bank_a", order_no)).state is QueryState.NOT_EXIST
    assert await channel.close("bank_a", order_no) is CloseResult.NOT_EXIST
    await channel.create(an_order(order_no))
    assert (await channel.query("bank_b", order_no)).state is QueryState.NOT_EXIST


# Refunds


async def test_refund_sent_many_times_moves_money_once(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    order = a_refund(f"{order_no}X1", order_no, await paid_order(channel, driver, order_no))
    assert await channel.query_refund(order) == Refunded(RefundAnswer.NOT_EXIST)
    answers = await asyncio.gather(*(channel.refund(order) for _ in range(5)))
    assert answers == [Refunded(RefundAnswer.REFUNDED)] * 5
    assert await channel.query_refund(order) == Refunded(RefundAnswer.REFUNDED)
    books = driver.order(order_no)
    assert (books["kept_minor"], books["captures"][0]["refunded_minor"], len(books["refunds"])) == (0, 1234, 1)


@pytest.mark.parametrize(
    ("terms", "code"),
    [
        ({"amount_minor": 1235}, "OVER_CAPTURED"),
        ({"currency": "USD"}, "CURRENCY_DIFFERS"),
        ({"channel_trade_no": "BANK_A-999999999999"}, "TRADE_NOT_EXIST"),
        ({"channel_order_no": "404"}, "TRADE_NOT_EXIST"),
    ],
)
async def test_refund_that_does_not_fit_the_capture_is_refused_for_good(
    channel: SimbankChannel, driver: Driver, order_no: str, terms: dict[str, object], code: str
) -> None:
    trade_no = await paid_order(channel, driver, order_no)
    order = a_refund(f"{order_no}X1", order_no, trade_no)._replace(**terms)  # type: ignore[arg-type]  # rows name fields
    for answer in [await channel.refund(order), await channel.query_refund(order)]:
        assert (answer.answer, answer.code) == (RefundAnswer.REFUSED, code)
    assert driver.order(order_no)["kept_minor"] == 1234


async def test_refund_of_more_than_is_left_is_refused(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    trade_no = await paid_order(channel, driver, order_no)
    await channel.refund(a_refund(f"{order_no}X1", order_no, trade_no, amount_minor=1000))
    second = await channel.refund(a_refund(f"{order_no}X2", order_no, trade_no))
    assert (second.answer, second.code) == (RefundAnswer.REFUSED, "OVER_CAPTURED")
    assert driver.order(order_no)["kept_minor"] == 234


async def test_refund_number_used_for_other_terms_is_a_conflict(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    order = a_refund(f"{order_no}X1", order_no, await paid_order(channel, driver, order_no))
    await channel.refund(order._replace(amount_minor=1))
    with pytest.raises(ChannelUnknownError, match="status 409"):
        await channel.refund(order)
    with pytest.raises(ChannelUnknownError, match="amount_minor is not the one asked about"):
        await channel.query_refund(order)
    assert driver.order(order_no)["kept_minor"] == 1233


# Faults of an order


async def test_fault_pay_twice_on_page_takes_money_twice(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    driver.plant(subject=f"Order {order_no}", pay_twice_on_page=True)
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    captures = (await channel.query("bank_a", order_no)).captures
    assert len({capture.channel_trade_no for capture in captures}) == 2
    assert driver.order(order_no)["kept_minor"] == 2468


async def test_fault_for_one_payment_only_needs_no_planting(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    await channel.create(an_order(order_no))
    assert len(driver.pay(order_no, pay_twice_on_page=True)["captures"]) == 2


async def test_fault_take_after_close_takes_money(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    driver.plant(subject=f"Order {order_no}", take_after_close=True)
    await channel.create(an_order(order_no))
    await channel.close("bank_a", order_no)
    assert driver.pay(order_no)["result"] == "PAID"
    assert (await channel.query("bank_a", order_no)).state is QueryState.PAID
    assert await channel.close("bank_a", order_no) is CloseResult.ALREADY_PAID


async def test_fault_take_after_expiry_takes_money(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    driver.plant(order_no=order_no, take_after_expiry=True)
    order = an_order(order_no, expire_at_ms=CLOCK.now_ms() + 200)
    await channel.create(order)
    wait_for(lambda: CLOCK.now_ms() >= order.expire_at_ms, "the order has expired")
    assert driver.pay(order_no)["captures"][0]["paid_at_ms"] >= order.expire_at_ms


async def test_fault_paid_at_ms_dates_the_payment(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    await channel.create(an_order(order_no))
    assert driver.pay(order_no, paid_at_ms=1)["captures"][0]["paid_at_ms"] == 1


@pytest.mark.parametrize(
    ("result", "state", "answer", "kept_minor"),
    [
        ("success", QueryState.PAID, CreateResult.PAID, 1234),
        ("failure", QueryState.FAILED, CreateResult.REFUSED, 0),
    ],
)
async def test_fault_charge_accepted_only_ends_later(
    channel: SimbankChannel,
    driver: Driver,
    order_no: str,
    result: str,
    state: QueryState,
    answer: CreateResult,
    kept_minor: int,
) -> None:
    driver.plant(subject=f"Order {order_no}", charge_accepted_only={"result": result, "delay_ms": 700})
    order = an_order(order_no, method=PayMethod.CHARGE)
    assert (await channel.create(order)).result is CreateResult.ACCEPTED
    assert (await channel.query("bank_a", order_no)).state is QueryState.IN_PROGRESS
    assert await channel.close("bank_a", order_no) is CloseResult.IN_PROGRESS
    assert driver.pay(order_no)["code"] == "IN_PROGRESS"
    assert driver.settled(order_no)["kept_minor"] == kept_minor
    assert (await channel.query("bank_a", order_no)).state is state
    assert (await channel.create(order)).result is answer


@pytest.mark.parametrize(
    ("result", "answer", "kept_minor"),
    [("success", RefundAnswer.REFUNDED, 0), ("failure", RefundAnswer.REFUSED, 1234)],
)
async def test_fault_refund_accepted_only_ends_later(
    channel: SimbankChannel, driver: Driver, order_no: str, result: str, answer: RefundAnswer, kept_minor: int
) -> None:
    driver.plant(order_no=order_no, refund_accepted_only={"result": result, "delay_ms": 500})
    order = a_refund(f"{order_no}X1", order_no, await paid_order(channel, driver, order_no))
    assert (await channel.refund(order)).answer is RefundAnswer.ACCEPTED
    assert driver.order(order_no)["kept_minor"] == 1234
    over = await channel.refund(a_refund(f"{order_no}X2", order_no, order.channel_trade_no, amount_minor=1))
    assert over.code == "OVER_CAPTURED"
    wait_for(lambda: driver.order(order_no)["refunds"][0]["result"] != "ACCEPTED", "the refund has ended")
    assert (await channel.query_refund(order)).answer is answer
    assert driver.order(order_no)["kept_minor"] == kept_minor


async def test_fault_refuse_refuses_create_close_and_refund(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    refused_order = f"{order_no}1"
    driver.plant(order_no=refused_order, refuse={"create": "NO_CREDIT"})
    refused = await channel.create(an_order(refused_order, method=PayMethod.CHARGE))
    assert (refused.result, refused.code) == (CreateResult.REFUSED, "NO_CREDIT")
    assert (await channel.query("bank_a", refused_order)).state is QueryState.FAILED

    driver.plant(order_no=order_no, refuse={"close": {"value": True, "times": 1}, "refund": "NO_BALANCE"})
    await channel.create(an_order(order_no))
    assert await channel.close("bank_a", order_no) is CloseResult.IN_PROGRESS
    trade_no = driver.pay(order_no)["captures"][0]["trade_no"]
    answer = await channel.refund(a_refund(f"{order_no}X1", order_no, trade_no))
    assert (answer.answer, answer.code) == (RefundAnswer.REFUSED, "NO_BALANCE")
    assert driver.order(order_no)["kept_minor"] == 1234


# Faults of an operation: (fault, whether the operation is done although no usable answer comes)

UNUSABLE: list[tuple[str, object, bool]] = [
    ("hang_before_doing", True, False),
    ("hang_after_doing", True, True),
    ("error_500", True, False),
    ("error_500_after_doing", True, True),
    ("answer_delay_ms", 3 * HANG_TIMEOUT_MS, True),
    ("nonsense", "broken_json", True),
]


class Case(NamedTuple):
    """One order that is ready for one operation, and the operation."""

    order: ChannelOrder
    refund: RefundOrder
    operation: str

    async def ask(self, channel: SimbankChannel) -> object:
        match self.operation:
            case "create":
                return (await channel.create(self.order)).result
            case "query":
                return (await channel.query("bank_a", self.order.channel_order_no)).state
            case "close":
                return await channel.close("bank_a", self.order.channel_order_no)
            case "refund":
                return (await channel.refund(self.refund)).answer
        return (await channel.query_refund(self.refund)).answer

    def is_done(self, driver: Driver) -> bool:
        order_no = self.order.channel_order_no
        if self.operation == "create":
            return driver.has_order(order_no)
        books = driver.order(order_no)
        return bool(books["state"] == "CLOSED" if self.operation == "close" else books["refunds"])


async def made_ready(channel: SimbankChannel, order_no: str, operation: str) -> Case:
    method = PayMethod.REDIRECT if operation == "close" else PayMethod.CHARGE
    order = an_order(order_no, method=method)
    created = None if operation == "create" else await channel.create(order)
    trade_no = created.capture.channel_trade_no if created and created.capture else ""
    refund = a_refund(f"{order_no}X1", order_no, trade_no)
    if operation == "query_refund":
        await channel.refund(refund)
    return Case(order, refund, operation)


FINAL_ANSWERS = {
    "create": CreateResult.PAID,
    "query": QueryState.PAID,
    "close": CloseResult.CLOSED,
    "refund": RefundAnswer.REFUNDED,
    "query_refund": RefundAnswer.REFUNDED,
}
KEPT = {"create": 1234, "query": 1234, "close": 0, "refund": 0, "query_refund": 0}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("fault", "value", "done"), UNUSABLE)
async def test_fault_of_an_operation_leaves_no_answer_once_and_doing_it_again_does_it_once(
    channel: SimbankChannel,
    hasty: SimbankChannel,
    driver: Driver,
    order_no: str,
    operation: str,
    fault: str,
    value: object,
    done: bool,
) -> None:
    case = await made_ready(channel, order_no, operation)
    faults: dict[str, Any] = {fault: {operation: {"value": value, "times": 1}}}
    driver.plant(order_no=order_no, **faults)
    with pytest.raises(ChannelUnknownError):
        await case.ask(hasty)
    if operation in {"create", "close", "refund"}:
        assert case.is_done(driver) is done
    assert await case.ask(channel) == FINAL_ANSWERS[operation]
    assert driver.order(order_no)["kept_minor"] == KEPT[operation]


async def test_fault_answer_delay_only_delays_for_the_patient(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    driver.plant(subject=f"Order {order_no}", answer_delay_ms={"create": 400})
    before_ms = CLOCK.now_ms()
    assert (await channel.create(an_order(order_no))).result is CreateResult.OPEN
    assert CLOCK.now_ms() - before_ms >= 400


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "kind", ["broken_json", "html", "empty", "wrong_types", "wrong_number", "missing_fields", "unknown_word"]
)
async def test_fault_nonsense_is_never_believed(
    channel: SimbankChannel, driver: Driver, order_no: str, operation: str, kind: str
) -> None:
    trade_no = await paid_order(channel, driver, order_no)
    refund = a_refund(f"{order_no}X1", order_no, trade_no)
    await channel.refund(refund)
    driver.plant(order_no=order_no, nonsense={operation: kind})
    driver.plant(order_no=f"{order_no}1", nonsense={operation: kind})
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "create": lambda: channel.create(an_order(f"{order_no}1")),
        "query": lambda: channel.query("bank_a", order_no),
        "close": lambda: channel.close("bank_a", order_no),
        "refund": lambda: channel.refund(refund),
        "query_refund": lambda: channel.query_refund(refund),
    }
    with pytest.raises(ChannelUnknownError, match="nonsense"):
        await calls[operation]()


async def test_fault_planted_again_takes_the_place_of_the_first(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    driver.plant(order_no=order_no, pay_twice_on_page=True, error_500={"query": True})
    driver.plant(order_no=order_no)
    assert await paid_order(channel, driver, order_no)
    assert len((await channel.query("bank_a", order_no)).captures) == 1


async def test_fault_of_one_bank_is_none_of_another(channel: SimbankChannel, driver: Driver, order_no: str) -> None:
    driver.plant(order_no=order_no, bank="bank_b", error_500={"create": True})
    assert (await channel.create(an_order(order_no))).result is CreateResult.OPEN


# The door


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("PUT", "/faults", {"bank": "bank_a", "match": {}, "faults": {}}, 400),
        ("PUT", "/faults", {"bank": "bank_a", "match": {"order_no": "1", "subject": "a"}, "faults": {}}, 400),
        ("PUT", "/faults", {"bank": "bank_a", "match": {"order_no": "1"}, "faults": {"explode": True}}, 400),
        ("PUT", "/faults", {"bank": "bank_z", "match": {"order_no": "1"}, "faults": {}}, 404),
        ("POST", "/notifications/hold", {}, 400),
        ("POST", "/notifications/resend", {"bank": "bank_a", "order_no": "1", "times": 0}, 400),
        ("POST", "/notifications/release", {"bank": "bank_z"}, 404),
        ("GET", "/books?bank=bank_z", None, 404),
        ("POST", "/banks/bank_a/orders", {}, 401),
        ("GET", "/banks/bank_a/orders/1", None, 401),
        ("POST", "/banks/bank_z/orders", {}, 404),
        ("GET", "/nowhere", None, 404),
    ],
)
def test_request_that_breaks_a_rule_is_refused(
    bank: Running, method: str, path: str, body: object, status: int
) -> None:
    answer = httpx.request(method, f"{bank.url}{path}", json=body, trust_env=False)
    assert answer.status_code == status


def test_driver_body_not_declared_as_json_is_refused(bank: Running) -> None:
    """A form in a browser cannot declare JSON, so no page can plant a fault unasked."""
    answer = httpx.post(f"{bank.url}/notifications/hold", content=b'{"bank":"bank_a"}', trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (415, "NOT_JSON")


def test_body_over_the_limit_is_refused(bank: Running) -> None:
    answer = httpx.post(f"{bank.url}/banks/bank_a/orders", content=b" " * 65_537, trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (413, "TOO_LARGE")


async def test_request_signed_with_another_banks_secret_is_refused(bank: Running, order_no: str) -> None:
    impostor = SimbankChannel(bank.url, {"bank_a": SECRETS["bank_b"]}, 10_000, CLOCK)
    with pytest.raises(ChannelUnknownError, match="status 401"):
        await impostor.create(an_order(order_no))
    await impostor.aclose()


async def test_request_replayed_byte_for_byte_is_refused(
    driver: Driver, channel: SimbankChannel, order_no: str
) -> None:
    """A recorded close must not close the order again later."""
    path = f"/banks/bank_a/orders/{order_no}/close"
    headers = channel._signature(channel._secrets["bank_a"], f"POST {path}", b"{}")
    answers = [driver.http.post(path, content=b"{}", headers=headers).json()["code"] for _ in range(2)]
    assert answers == ["NOT_EXIST", "SIGNATURE_REPLAYED"]


async def test_request_with_an_old_timestamp_is_refused(bank: Running, order_no: str) -> None:
    class SlowClock:
        def now_ms(self) -> int:
            return CLOCK.now_ms() - 301_000

    late = SimbankChannel(bank.url, SECRETS, 10_000, SlowClock())
    with pytest.raises(ChannelUnknownError, match="status 401"):
        await late.query("bank_a", order_no)
    await late.aclose()


async def test_log_of_refused_and_accepted_requests_shows_no_secret(bank: Running, channel: SimbankChannel) -> None:
    impostor = SimbankChannel(bank.url, {"bank_a": SECRETS["bank_b"]}, 10_000, CLOCK)
    with pytest.raises(ChannelUnknownError):
        await impostor.query("bank_a", "1")
    await impostor.aclose()
    await channel.query("bank_a", "1")
    log = bank.log.read_text()
    assert "request_refused" in log
    assert not [secret for secret in SECRETS.values() if secret in log]
    assert SECRETS["bank_a"] not in repr(vars(channel))


# Refunds that end in other ways


async def test_fault_refund_closed_ends_a_number_without_money_and_the_next_one_refunds(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    trade_no = await paid_order(channel, driver, order_no)
    driver.plant(order_no=order_no, refund_closed={"value": True, "times": 1})
    first, second = (a_refund(f"{order_no}X{n}", order_no, trade_no) for n in (1, 2))
    for answer in [await channel.refund(first), await channel.query_refund(first), await channel.refund(first)]:
        assert (answer.answer, answer.code) == (RefundAnswer.NEEDS_NEW_NUMBER, "CLOSED")
    assert driver.order(order_no)["kept_minor"] == 1234
    assert await channel.refund(second) == Refunded(RefundAnswer.REFUNDED)
    assert driver.order(order_no)["kept_minor"] == 0


async def test_capture_that_the_bank_returns_is_told_and_refunded_no_more(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    trade_no = await paid_order(channel, driver, order_no)
    first, second = (a_refund(f"{order_no}X{n}", order_no, trade_no) for n in (1, 2))
    assert driver.give_back(order_no, trade_no)["result"] == "RETURNED"
    assert await channel.query_refund(first) == Refunded(RefundAnswer.RETURNED)
    refused = await channel.refund(first)
    assert (refused.answer, refused.code) == (RefundAnswer.REFUSED, "OVER_CAPTURED")
    for order in (first, second):
        assert await channel.query_refund(order) == Refunded(RefundAnswer.RETURNED)
    books = driver.order(order_no)
    assert (books["kept_minor"], books["captures"][0]["refunded_minor"]) == (0, 1234)
    assert sorted(one["result"] for one in books["refunds"]) == ["REFUSED", "RETURNED"]


async def test_capture_that_was_refunded_is_not_returned_too(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    order = a_refund(f"{order_no}X1", order_no, await paid_order(channel, driver, order_no))
    await channel.refund(order)
    for trade_no in (order.channel_trade_no, "BANK_A-999999999999"):
        asked = {"bank": "bank_a", "order_no": order_no, "trade_no": trade_no}
        assert driver.http.post("/returns", json=asked).status_code == 409
    assert await channel.query_refund(order) == Refunded(RefundAnswer.REFUNDED)
    assert len(driver.order(order_no)["refunds"]) == 1


async def test_return_of_one_capture_says_nothing_about_the_other(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    driver.plant(order_no=order_no, pay_twice_on_page=True)
    await paid_order(channel, driver, order_no)
    first, second = (one["trade_no"] for one in driver.order(order_no)["captures"])
    driver.give_back(order_no, first)
    other = a_refund(f"{order_no}X1", order_no, second)
    assert await channel.query_refund(other) == Refunded(RefundAnswer.NOT_EXIST)
    assert await channel.refund(other) == Refunded(RefundAnswer.REFUNDED)


async def test_query_of_a_refund_with_an_odd_trade_number_is_signed_as_it_is_sent(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    await paid_order(channel, driver, order_no)
    odd = "".join(map(chr, range(0x21, 0x61)))
    assert await channel.query_refund(a_refund(f"{order_no}X1", order_no, odd)) == Refunded(RefundAnswer.NOT_EXIST)


async def test_fault_for_everything_holds_for_all_orders_and_is_counted(
    channel: SimbankChannel, driver: Driver, order_no: str
) -> None:
    trade_no = await paid_order(channel, driver, order_no)
    before = driver.asked("bank_a")
    everything = dict.fromkeys(OPERATIONS, True)
    driver.plant_everywhere(error_500=everything)
    try:
        refund = a_refund(f"{order_no}X1", order_no, trade_no)
        for _ in range(2):
            with pytest.raises(ChannelUnknownError):
                await channel.query_refund(refund)
        with pytest.raises(ChannelUnknownError):
            await channel.query("bank_a", order_no)
    finally:
        driver.plant_everywhere()
    asked = driver.asked("bank_a")
    assert {what: asked[what] - before[what] for what in ("query_refund", "query", "refund")} == {
        "query_refund": 2,
        "query": 1,
        "refund": 0,
    }
    assert (await channel.query("bank_a", order_no)).state is QueryState.PAID
