"""What happens in a day: each story is one merchant order, from Pay to where its user loses interest.

A story asserts nothing about money, for a kill may fall anywhere into it: the books are compared when all is done.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import httpx

from paycore.client.errors import PaycoreRpcError
from paycore.domain.ids import format_channel_order_no
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.crash.calls import Calls, failure, success

BANKS = ("bank_a", "bank_b", "bank_c")
LONG_MS, SHORT_MS = 3_600_000, 1_000

_LATER = {"result": "success", "delay_ms": 300}


def once(value: object = True) -> dict[str, object]:
    """A fault that holds one time."""
    return {"value": value, "times": 1}


class Users:
    """Whoever sits before the banks' pages, and whoever plants the banks' faults."""

    def __init__(self, url: str) -> None:
        # Given up before the banks' server gives it up: a request on a connection that is just being closed is lost.
        kept = httpx.Limits(keepalive_expiry=1)
        self._http = httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, limits=kept)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def pay(self, page: Page, **faults: object) -> list[dict[str, Any]]:
        """Press the button; return the captures. The page may say no."""
        answer = await self._http.post(
            f"/banks/{page.bank}/pay/{page.order_no}", headers={"Accept": "application/json"}, json={"faults": faults}
        )
        assert answer.status_code in {200, 409}, answer.text
        captures: list[dict[str, Any]] = answer.json()["captures"]
        return captures

    async def give_back(self, page: Page, trade_no: str) -> None:
        """Have the bank send a capture back by itself, unless it was asked to already."""
        asked = {"bank": page.bank, "order_no": page.order_no, "trade_no": trade_no}
        answer = await self._http.post("/returns", json=asked)
        assert answer.status_code in {200, 409}, answer.text

    async def plant(self, subject: str, bank: str, **faults: object) -> None:
        """Make a bank fail in its dealings about an order that does not exist yet."""
        asked = {"bank": bank, "match": {"subject": subject}, "faults": faults}
        answer = await self._http.put("/faults", json=asked)
        assert answer.status_code == 200, answer.text

    async def books(self) -> dict[str, Any]:
        """Everything that the banks have on record."""
        answer = await self._http.get("/books")
        found: dict[str, Any] = answer.json()
        return found


class Page(NamedTuple):
    """Where a user can pay."""

    bank: str
    payment_id: int
    attempt: int

    @property
    def order_no(self) -> str:
        """The bank's number for it."""
        return format_channel_order_no(self.payment_id, self.attempt)


class Order(NamedTuple):
    """What a merchant asks money for. Its number is the subject too, so that faults can be planted for it."""

    number: str
    amount_minor: int


class Day:
    """What the stories have in common."""

    def __init__(self, calls: Calls, users: Users, draw: random.Random, name: str) -> None:
        self.calls = calls
        self.users = users
        self.draw = draw
        self._name = name
        self._numbers = itertools.count(1)

    def order(self) -> Order:
        """A new order of some amount."""
        return Order(f"{self._name}-{next(self._numbers)}", self.draw.randint(1, 999_999))

    def banks(self, count: int) -> list[str]:
        """Some banks, each once."""
        return self.draw.sample(BANKS, count)

    async def open(
        self, order: Order, bank: str, *, method: str = "REDIRECT", validity_ms: int = LONG_MS
    ) -> Page | None:
        """Call Pay until there is a page, or until there is no hope of one."""
        try:
            answer = await self.calls.pay(order.number, order.amount_minor, bank, method, validity_ms)
            while answer.next_action == payment_service_pb2.PAY_NEXT_ACTION_WAIT and method != "CHARGE":
                # Whoever was killed while opening it holds a lease on it for a while.
                await asyncio.sleep(0.2)
                answer = await self.calls.pay(order.number, order.amount_minor, bank, method, validity_ms)
        except PaycoreRpcError as error:
            if error.reason not in _NO_PAGE:
                raise
            return None
        if answer.state == payment_pb2.PAYMENT_STATE_PAID or not answer.HasField("attempt"):
            return None
        return Page(bank, answer.payment_id, answer.attempt.attempt)

    async def close(self, page: Page) -> None:
        """The merchant changes his mind; the payment may be paid already."""
        try:
            await self.calls.close(page.payment_id)
        except PaycoreRpcError as error:
            if error.reason != "PAYMENT_PAID":
                raise

    async def think(self, longest_seconds: float = 0.1) -> None:
        """People take their time."""
        await asyncio.sleep(self.draw.uniform(0, longest_seconds))

    async def look(self, page: Page, times: int = 2) -> None:
        """The merchant's page asks how it stands."""
        for _ in range(times):
            await self.think()
            await self.calls.query(page.payment_id)


_NO_PAGE = {"PAYMENT_CLOSED", "PAYMENT_EXPIRED", "PAYMENT_EXPIRING", "CHANNEL_REFUSED"}

Story = Callable[[Day], Awaitable[None]]


async def paid_once(day: Day) -> None:
    """The usual one."""
    order, (bank,) = day.order(), day.banks(1)
    page = await day.open(order, bank, method=day.draw.choice(["REDIRECT", "QR"]))
    if page is not None:
        await day.think()
        await day.users.pay(page)
        await day.look(page)


async def _two_pages(day: Day, **faults: object) -> None:
    """A user pays one order at two banks at once; what is surplus meets the faults on its way back."""
    order, banks = day.order(), day.banks(2)
    for bank in banks:
        # Opening the second page has the first one closed at its bank; this user has it open still.
        await day.users.plant(order.number, bank, take_after_close=True, **faults)
    pages = [page for bank in banks if (page := await day.open(order, bank)) is not None]
    await asyncio.gather(*(day.users.pay(page) for page in pages))
    for page in pages[:1]:
        await day.look(page, 1)


async def another_page(day: Day) -> None:
    """A user opens a second page and pays there; the first is to be closed."""
    order, banks = day.order(), day.banks(2)
    pages = [page for bank in banks if (page := await day.open(order, bank)) is not None]
    await asyncio.sleep(0.3)
    for page in pages[1:]:
        await day.users.pay(page)


async def two_pages(day: Day) -> None:
    """Both pages are paid."""
    await _two_pages(day)


async def two_pages_and_a_bank_that_hangs(day: Day) -> None:
    """The bank sends the money back and never says so."""
    await _two_pages(day, hang_after_doing={"refund": once()})


async def two_pages_and_a_bank_that_breaks(day: Day) -> None:
    """The bank sends the money back and answers with an error; asked about it, it talks nonsense."""
    await _two_pages(day, error_500_after_doing={"refund": once()}, nonsense={"query_refund": once("broken_json")})


async def two_pages_and_a_bank_that_takes_its_time(day: Day) -> None:
    """The bank accepts the refund, and moves the money later."""
    await _two_pages(day, refund_accepted_only=_LATER)


async def two_pages_and_a_bank_that_refuses_at_first(day: Day) -> None:
    """The bank refuses the first refund for good: it takes a second number."""
    await _two_pages(day, refuse={"refund": once("TRY_AGAIN_TOMORROW")})


async def charged(day: Day) -> None:
    """The bank takes the money while Pay waits."""
    order, (bank,) = day.order(), day.banks(1)
    await day.open(order, bank, method="CHARGE")


async def charged_by_a_bank_that_hangs(day: Day) -> None:
    """The bank takes the money and never says so."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, hang_after_doing={"create": once()}, notify_delay_ms=1_500)
    await day.open(order, bank, method="CHARGE")


async def charged_later(day: Day) -> None:
    """The bank accepts the charge; it succeeds, or fails, a moment later."""
    order, (bank,) = day.order(), day.banks(1)
    result = day.draw.choice(["success", "success", "failure"])
    await day.users.plant(order.number, bank, charge_accepted_only={"result": result, "delay_ms": 200})
    page = await day.open(order, bank, method="CHARGE", validity_ms=LONG_MS if result == "success" else 5_000)
    if page is not None:
        await day.look(page)


async def closed(day: Day) -> None:
    """Nobody pays, and the merchant closes."""
    order, (bank,) = day.order(), day.banks(1)
    page = await day.open(order, bank)
    if page is not None:
        await day.think()
        await day.close(page)


async def closed_then_paid(day: Day) -> None:
    """The merchant closes; the bank takes the money all the same."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, take_after_close=True)
    page = await day.open(order, bank)
    if page is not None:
        await day.close(page)
        await day.users.pay(page)


async def closed_then_paid_and_returned(day: Day) -> None:
    """The bank sends what came too late back by itself, before paycore hears of it or while it does so too."""
    order, (bank,) = day.order(), day.banks(1)
    delay_ms = day.draw.choice([0, 100, 500])
    await day.users.plant(order.number, bank, take_after_close=True, notify_delay_ms=delay_ms)
    page = await day.open(order, bank)
    if page is not None:
        await day.close(page)
        for capture in await day.users.pay(page):
            await day.users.give_back(page, capture["trade_no"])


async def closed_while_paid(day: Day) -> None:
    """The user pays and the merchant closes in one instant."""
    order, (bank,) = day.order(), day.banks(1)
    page = await day.open(order, bank)
    if page is not None:
        await asyncio.gather(day.close(page), day.users.pay(page))
        await day.look(page, 1)


async def left_to_expire(day: Day) -> None:
    """Nobody pays, and nobody closes."""
    order, (bank,) = day.order(), day.banks(1)
    await day.open(order, bank, validity_ms=SHORT_MS)


async def paid_after_expiry(day: Day) -> None:
    """The bank takes the money although the time is over."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, take_after_expiry=True, take_after_close=True)
    page = await day.open(order, bank, validity_ms=SHORT_MS)
    if page is not None:
        await asyncio.sleep(day.draw.uniform(0.9, 1.6))
        await day.users.pay(page)


async def lost_notification(day: Day) -> None:
    """The user pays, and the bank never says so unless it is asked."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, notify_never=True)
    page = await day.open(order, bank, validity_ms=day.draw.choice([5_000, LONG_MS]))
    if page is not None:
        await day.users.pay(page)


async def lost_notification_then_closed(day: Day) -> None:
    """The same, and the merchant closes."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, notify_never=True)
    page = await day.open(order, bank)
    if page is not None:
        await day.users.pay(page)
        await day.close(page)


async def paid_twice_on_one_page(day: Day) -> None:
    """The bank takes the money twice for one order of its own; only the bank itself can confirm it."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, pay_twice_on_page=True)
    page = await day.open(order, bank)
    if page is not None:
        await day.users.pay(page)


async def paid_twice_on_one_page_and_never_told(day: Day) -> None:
    """The same, and both are found by asking only."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, pay_twice_on_page=True, notify_never=True)
    page = await day.open(order, bank, validity_ms=day.draw.choice([5_000, LONG_MS]))
    if page is not None:
        await day.users.pay(page)


async def paid_and_said_to_have_failed(day: Day) -> None:
    """The bank takes the money, says so, and says then that it failed."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, notify_failure_after_success=True)
    page = await day.open(order, bank)
    if page is not None:
        await day.users.pay(page)


async def another_amount_taken(day: Day) -> None:
    """The bank takes another amount than it was asked for."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, captured_amount_minor=order.amount_minor + 1)
    page = await day.open(order, bank, validity_ms=5_000)
    if page is not None:
        await day.users.pay(page)


async def told_by_a_gateway(day: Day) -> None:
    """A gateway of the company's own hands the words on: one by one and all together, some of them twice."""
    order, banks = day.order(), day.banks(2)
    words = []
    for bank in banks:
        await day.users.plant(order.number, bank, notify_never=True, take_after_close=True)
        page = await day.open(order, bank)
        captures = [] if page is None else await day.users.pay(page)
        words += [_word(page, one) for one in captures if page is not None]
    first = await asyncio.gather(*(day.calls.notify(word) for word in words))
    if words:
        assert await day.calls.notify_batch(words) == first, "the same word, the same outcome"


def _word(page: Page, capture: dict[str, Any]) -> payment_service_pb2.NotifyRequest:
    said = (capture["trade_no"], capture["amount_minor"], capture["paid_at_ms"])
    return success(page.bank, page.payment_id, page.attempt, *said)


async def told_a_wrong_amount(day: Day) -> None:
    """The gateway says another amount at first; and the attempt is said to have failed."""
    order, (bank,) = day.order(), day.banks(1)
    await day.users.plant(order.number, bank, notify_never=True)
    page = await day.open(order, bank)
    captures = [] if page is None else await day.users.pay(page)
    for capture in captures:
        assert page is not None
        wrong = capture | {"amount_minor": capture["amount_minor"] + 1}
        await day.calls.notify_batch([_word(page, wrong)])
        await day.calls.notify(failure(page.bank, page.payment_id, page.attempt, capture["amount_minor"]))
        await day.calls.notify(_word(page, capture))


async def told_of_nobody(day: Day) -> None:
    """A word about an order that does not exist."""
    (bank,) = day.banks(1)
    number = day.draw.getrandbits(60) | 1
    words = [success(bank, number, attempt, f"NOBODY-{number}-{attempt}", 100, None) for attempt in (1, 2)]
    await day.calls.notify_batch(words)
