"""A channel without a bank: answers as a test lays down, counts its calls, and lets a test do something meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

from paycore.channels.protocol import (
    ChannelOrder,
    ChannelUnknownError,
    CloseResult,
    Created,
    CreateResult,
    Queried,
    QueryState,
    RefundAnswer,
    Refunded,
    RefundOrder,
)
from tests.support.clock import ManualClock


async def _nothing(_operation: str) -> None:
    """Do nothing meanwhile."""


class ScriptedChannel:
    """Opens every page. dead: accounts that get no usable answer. meanwhile: run inside each other call."""

    def __init__(
        self, *, queried: QueryState = QueryState.NOT_PAID, refunded: RefundAnswer = RefundAnswer.REFUNDED
    ) -> None:
        self.queried = Queried(queried)
        self.refunded = Refunded(refunded)
        self.dead: set[str] = set()
        self.meanwhile: Callable[[str], Awaitable[None]] = _nothing
        self.asked: Counter[str] = Counter()
        self.asked_of: Counter[str] = Counter()

    async def create(self, order: ChannelOrder) -> Created:
        return Created(CreateResult.OPEN, pay_url=f"https://bank.example/{order.channel_order_no}")

    async def query(self, account: str, channel_order_no: str) -> Queried:
        del channel_order_no
        await self._called("query", account)
        return self.queried

    async def close(self, account: str, channel_order_no: str) -> CloseResult:
        del channel_order_no
        await self._called("close", account)
        return CloseResult.CLOSED

    async def refund(self, order: RefundOrder) -> Refunded:
        await self._called("refund", order.account)
        return self.refunded

    async def query_refund(self, order: RefundOrder) -> Refunded:
        await self._called("query_refund", order.account)
        return self.refunded

    async def aclose(self) -> None:
        """Hold nothing."""

    async def _called(self, operation: str, account: str) -> None:
        self.asked[operation] += 1
        self.asked_of[account] += 1
        await self.meanwhile(operation)
        # As any channel takes a while: others may be called meanwhile.
        await asyncio.sleep(0)
        if account in self.dead:
            raise ChannelUnknownError("no answer")


def jump_once(clock: ManualClock, by_ms: int) -> Callable[[str], Awaitable[None]]:
    """Let the clock jump inside the first call."""
    jumps = [by_ms]

    async def jump(_operation: str) -> None:
        if jumps:
            clock.advance(jumps.pop())

    return jump
