"""kill -9 of a real server under load: what was answered is there, what was not can be sent again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from paycore.client.aio import AsyncPaycoreClient
from paycore.client.errors import PaycoreRpcError
from paycore.domain.ids import format_channel_order_no
from paycore.v1 import payment_pb2
from tests.support.clock import ShiftedClock
from tests.support.core import ACCOUNTS, AMOUNT_MINOR, CHANNEL, Core, check_money_rules, fresh_database, read_all
from tests.support.server import ServerProcess

ACCEPTED, DUPLICATE = payment_pb2.NOTIFY_OUTCOME_ACCEPTED, payment_pb2.NOTIFY_OUTCOME_DUPLICATE
IN_FLIGHT = 24
PAYMENTS = 400

Word = tuple[int, int]
"""(payment_id, attempt)."""
Answer = tuple[int, bool]
"""(outcome, replayed)."""


async def tell(client: AsyncPaycoreClient, word: Word) -> Answer:
    payment_id, attempt = word
    answer = await client.notify(
        channel=CHANNEL,
        account=ACCOUNTS[attempt - 1],
        channel_order_no=format_channel_order_no(payment_id, attempt),
        result=payment_pb2.CHANNEL_RESULT_SUCCESS,
        amount_minor=AMOUNT_MINOR,
        currency="CNY",
        channel_trade_no=f"T{attempt}",
        paid_at_ms=None,
    )
    return answer.outcome, answer.replayed


async def tell_all(
    address: str, words: list[Word], answered: dict[Word, Answer], enough: asyncio.Event, at: int
) -> None:
    """Tell from many callers at once; set ``enough`` after so many answers. A caller stops at its first error."""
    waiting = iter(words)

    async def caller(client: AsyncPaycoreClient) -> None:
        for word in waiting:
            try:
                answered[word] = await tell(client, word)
            except PaycoreRpcError:
                return
            if len(answered) >= at:
                enough.set()

    async with AsyncPaycoreClient(address, timeout_ms=5_000) as client:
        await asyncio.gather(*(caller(client) for _ in range(IN_FLIGHT)))


@pytest.fixture
async def made(tmp_path: Path) -> tuple[Path, list[int]]:
    """A database with payments that have two open attempts each."""
    path = fresh_database(tmp_path / "paycore.db")
    with Core(path, clock=ShiftedClock()) as core:
        ids = await asyncio.gather(*(core.make_payment("bank_a", "bank_b") for _ in range(PAYMENTS)))
    return path, list(ids)


async def test_server_killed_under_load_has_everything_that_it_answered_and_doubles_nothing(
    made: tuple[Path, list[int]],
) -> None:
    path, ids = made
    words = [(payment_id, attempt) for payment_id in ids for attempt in (1, 2)]
    told: dict[Word, Answer] = {}
    with ServerProcess(path) as server:
        for kill_at in (150, 400):
            enough = asyncio.Event()
            answered: dict[Word, Answer] = {}
            left = [word for word in words if word not in told]
            load = asyncio.create_task(tell_all(server.address, left, answered, enough, kill_at - len(told)))
            await asyncio.wait_for(enough.wait(), 30)
            await asyncio.to_thread(server.kill)
            await load
            assert len(answered) < len(left), "the server was killed before all was told"
            told.update(answered)
            recorded = captures(path)
            assert {word: outcome for word, (outcome, _) in told.items()}.items() <= recorded.items()
            check_money_rules(read_all(path))
            await asyncio.to_thread(server.restart)
        async with AsyncPaycoreClient(server.address) as client:
            again = dict(zip(words, await asyncio.gather(*(tell(client, word) for word in words)), strict=True))
    for word, (outcome, _) in told.items():
        assert again[word] == (outcome, True)
    for payment_id in ids:
        assert sorted(again[payment_id, attempt][0] for attempt in (1, 2)) == [ACCEPTED, DUPLICATE]
    rows = read_all(path)
    check_money_rules(rows)
    assert (len(rows["payment_outcome"]), len(rows["refund"])) == (PAYMENTS, PAYMENTS)


def captures(path: Path) -> dict[Word, int]:
    """Every capture on record with the outcome that it got."""
    rows = read_all(path)
    kept = {(row.payment_id, row.attempt): int(ACCEPTED) for row in rows["payment_outcome"]}
    return kept | {(row.payment_id, row.attempt): row.reason for row in rows["excess_payment"]}
