"""Refunds that are owed for real: money at a bank that a payment does not keep, many at a time."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from paycore.channels.protocol import Channel, CreateResult, RefundOrder
from paycore.domain.ids import excess_refund_no, format_channel_order_no
from paycore.domain.verdicts import NotifyOutcome, PayMethod, RefundState
from paycore.store.rows import RefundResultRow, RefundTryRow
from tests.support.bank import Town
from tests.support.core import AMOUNT_MINOR
from tests.support.simbank import adapter, an_order

BANK = "bank_b"


class Owed(NamedTuple):
    """A payment that keeps its first attempt's capture and owes back what bank B took for its second."""

    town: Town
    payment_id: int
    trade_no: str

    @property
    def refund_no(self) -> str:
        return excess_refund_no(2, self.trade_no)

    @property
    def order_no(self) -> str:
        """The number of the order at bank B."""
        return format_channel_order_no(self.payment_id, 2)

    def sent_no(self, seq: int = 1) -> str:
        return f"{self.payment_id}{self.refund_no}{seq:02d}"

    def refund_order(self, seq: int = 1) -> RefundOrder:
        """The refund as the bank is asked for it."""
        return RefundOrder(BANK, self.sent_no(seq), self.order_no, self.trade_no, AMOUNT_MINOR, "CNY")

    def plant(self, **faults: Any) -> None:
        """Plant faults in the place of those that stood."""
        self.town.driver.plant(order_no=self.order_no, bank=BANK, **faults)

    def at_bank(self) -> dict[str, str]:
        """Every refund in bank B's books: number -> result."""
        return {one["refund_no"]: one["result"] for one in self.town.driver.order(self.order_no, BANK)["refunds"]}

    def kept_minor(self) -> int:
        """What bank B holds of the user's money."""
        kept: int = self.town.driver.order(self.order_no, BANK)["kept_minor"]
        return kept

    async def tries(self) -> list[RefundTryRow]:
        return (await self.town.file(self.payment_id)).refund_tries

    async def states(self) -> list[tuple[int, RefundState]]:
        return [(row.seq, RefundState(row.state)) for row in await self.tries()]

    async def results(self) -> list[RefundResultRow]:
        return (await self.town.file(self.payment_id)).refund_results


_PATIENCE_MS = 20_000


async def owe(town: Town, count: int) -> list[Owed]:
    """Let so many payments owe back what bank B charged."""
    channel = adapter(str(town.driver.http.base_url), _PATIENCE_MS)
    try:
        return list(await asyncio.gather(*(_owe(town, channel) for _ in range(count))))
    finally:
        await channel.aclose()


async def owe_one(town: Town) -> Owed:
    (owed,) = await owe(town, 1)
    return owed


async def _owe(town: Town, channel: Channel) -> Owed:
    payment_id = await town.core.make_payment("bank_a", BANK)
    order = an_order(
        format_channel_order_no(payment_id, 2), account=BANK, method=PayMethod.CHARGE, amount_minor=AMOUNT_MINOR
    )
    created = await channel.create(order)
    assert created.result is CreateResult.PAID
    assert created.capture is not None
    trade_no = created.capture.channel_trade_no
    verdicts = await town.core.notify_many(town.core.word(payment_id), town.core.word(payment_id, 2, trade_no))
    assert [verdict.outcome for verdict in verdicts] == [NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE]
    return Owed(town, payment_id, trade_no)
