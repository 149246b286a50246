"""paycore beside real banks: use cases in this process, the simulator in one of its own, its words handed on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import format_channel_order_no
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import ChannelResult
from paycore.store.rows import PaymentFile
from paycore.usecases.keys import ByPaymentId
from paycore.usecases.pay_command import PayCommand
from tests.support.clock import ShiftedClock
from tests.support.core import CHANNEL, Core, pay_command
from tests.support.simbank import Driver, Received, Receiver, Running, adapter

CHANNEL_TIMEOUT_MS = 700
LEASE_MS = 60_000

_numbers = itertools.count(1)


class Street(NamedTuple):
    """The banks' process, who drives it, and who receives its notifications."""

    bank: Running
    driver: Driver
    receiver: Receiver


class Town(NamedTuple):
    """A core, the banks that it talks to, and who drives them."""

    core: Core
    clock: ShiftedClock
    driver: Driver
    receiver: Receiver

    def order(self, account: str = "bank_a", **changes: Any) -> PayCommand:
        """A new merchant order; its subject is its own, so that faults can be planted before Pay."""
        return pay_command(f"order-{next(_numbers)}-{id(self):x}", account, **changes)

    def plant(self, command: PayCommand, bank: str = "", **faults: Any) -> None:
        """Plant faults for an order that does not exist yet."""
        self.driver.plant(subject=command.subject, bank=bank or command.account, **faults)

    def user_pays(self, payment_id: int, attempt: int = 1, bank: str = "bank_a", **faults: object) -> list[str]:
        """The user pays on the bank's page; return the trade numbers."""
        paid = self.driver.pay(format_channel_order_no(payment_id, attempt), bank, **faults)
        assert paid["result"] == "PAID", paid
        return [capture["trade_no"] for capture in paid["captures"]]

    def books(self, payment_id: int, attempt: int = 1, bank: str = "bank_a") -> dict[str, Any]:
        """What the bank itself has on record about an attempt."""
        return self.driver.order(format_channel_order_no(payment_id, attempt), bank)

    def kept_minor(self, payment_id: int, *attempts: tuple[int, str]) -> int:
        """What the banks hold of the user's money, over all attempts."""
        return sum(self.books(payment_id, attempt, bank)["kept_minor"] for attempt, bank in attempts)

    async def file(self, payment_id: int) -> PaymentFile:
        return await self.core.query.find(ByPaymentId(payment_id))

    async def hand_on(self, payment_id: int, attempt: int = 1) -> list[Verdict]:
        """Give the core every notification that the banks have sent about an attempt, in their order."""
        order_no = format_channel_order_no(payment_id, attempt)
        async with asyncio.timeout(20):
            while not self.receiver.of_order(order_no):
                await asyncio.sleep(0.01)
        words = [one for one in list(self.receiver.received) if one.body["order_no"] == order_no]
        return [await self.core.notify(as_notification(one, self.clock.now_ms())) for one in words]

    async def refund(self, passes: int = 1) -> None:
        for _ in range(passes):
            await self.core.refunder.run_once()
            # The pass after the next retry's time: retries wait milliseconds here, leases a minute.
            self.clock.advance(1_000)


def as_notification(received: Received, now_ms: int) -> Notification:
    """What the forwarder makes of a bank's word."""
    body = received.body
    return Notification(
        CHANNEL,
        body["bank"],
        body["order_no"],
        ChannelResult[body["result"]],
        body["amount_minor"],
        body["currency"],
        body["trade_no"],
        ABSENT_MS if body["paid_at_ms"] is None else body["paid_at_ms"],
        now_ms,
        raw=received.raw,
    )


@asynccontextmanager
async def a_town(
    url: str, street: Street, *, timeout_ms: int = CHANNEL_TIMEOUT_MS, **settings: Any
) -> AsyncIterator[Town]:
    """A core on a database. timeout_ms: how long its adapter waits for a bank."""
    clock = ShiftedClock()
    channel = adapter(street.bank.url, timeout_ms)
    with Core(url, clock=clock, channels={CHANNEL: channel}, **{"lease_ms": LEASE_MS, **settings}) as core:
        try:
            yield Town(core, clock, street.driver, street.receiver)
        finally:
            await core.payer.drain()
            await core.registry.aclose()
