"""Seen by the kernel: each call is answered after the log that holds what it wrote was synced.

The server runs under strace. What a call writes is found in the bytes that go to the write-ahead log, and its answer in
the bytes that go to the client's socket.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from paycore.client.requests import batch_request, close_request, notify_request, pay_request
from paycore.store.schema import migrate
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.crash.traced import Answered, hasty_answers, read_trace, tracer
from tests.support.facts import AMOUNT_MINOR, CURRENCY, put_payments, select
from tests.support.server import ServerProcess
from tests.support.simbank import SECRETS, bank_process, wait_for

ONE_BY_ONE = 10
AT_ONCE = 24
IN_BATCH = 16
ORDERS = 6
GATE = "writer.taken"
"""Where the writer is held with one group while the next one gathers."""
HASTY = [sys.executable, "-m", "tests.crash.hasty"]


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace is not installed (Debian: apt-get install strace): the order is NOT shown here")
    probe = subprocess.run([found, "-o", os.devnull, sys.executable, "-c", ""], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here, the order is NOT shown: {probe.stderr.strip()}")
    return found


class Caller:
    """Calls a server and keeps each answer as it came over the wire."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.answered: list[Answered] = []

    async def _call(self, rpc: str, request: Any) -> bytes:
        method: Any = self._channel.unary_unary(
            f"/paycore.v1.PaymentService/{rpc}", request_serializer=type(request).SerializeToString
        )
        answer: bytes = await method(request, timeout=60)
        return answer

    async def notify(self, channel_order_no: str) -> None:
        """Tell one word."""
        word = _word(channel_order_no)
        answer = await self._call("Notify", word)
        said = payment_service_pb2.NotifyResponse.FromString(answer)
        assert said.outcome == payment_pb2.NOTIFY_OUTCOME_ACCEPTED
        self.answered.append(Answered(f"Notify {channel_order_no}", [word.channel_trade_no.encode()], answer))

    async def notify_batch(self, channel_order_nos: Sequence[str]) -> None:
        """Tell several words in one call."""
        words = [_word(number) for number in channel_order_nos]
        answer = await self._call("NotifyBatch", batch_request(words))
        said = payment_service_pb2.NotifyBatchResponse.FromString(answer).answers
        assert [one.outcome for one in said] == [payment_pb2.NOTIFY_OUTCOME_ACCEPTED] * len(words)
        marks = [word.channel_trade_no.encode() for word in words]
        self.answered.append(Answered(f"NotifyBatch {channel_order_nos[0]}", marks, answer))

    async def pay(self, number: str) -> int:
        """Open a page; return the payment's id. What was written last is what the user gets."""
        request = pay_request(
            merchant_id="shop",
            merchant_order_no=number,
            amount_minor=AMOUNT_MINOR,
            currency=CURRENCY,
            subject=number,
            channel="simbank",
            account="bank_a",
            method=payment_pb2.PAY_METHOD_REDIRECT,
            return_url="",
            validity_ms=None,
        )
        answer = await self._call("Pay", request)
        said = payment_service_pb2.PayResponse.FromString(answer)
        assert said.attempt.pay_url
        self.answered.append(Answered(f"Pay {number}", [number.encode(), said.attempt.pay_url.encode()], answer))
        return said.payment_id

    async def close(self, payment_id: int) -> None:
        """Close a payment."""
        answer = await self._call(
            "Close", close_request(payment_id=payment_id, merchant_id=None, merchant_order_no=None)
        )
        self.answered.append(Answered(f"Close {payment_id}", [outcome_mark(payment_id)], answer))


def _word(channel_order_no: str) -> payment_service_pb2.NotifyRequest:
    return notify_request(
        channel="simbank",
        account="bank_a",
        channel_order_no=channel_order_no,
        result=payment_pb2.CHANNEL_RESULT_SUCCESS,
        amount_minor=AMOUNT_MINOR,
        currency=CURRENCY,
        channel_trade_no=f"trade-{channel_order_no}-durable",
        paid_at_ms=None,
    )


def outcome_mark(payment_id: int) -> bytes:
    """How a row of payment_outcome begins in SQLite's file: its id, the header's length, and an id told by the key.

    The header has one byte for its length and one for each of the 14 columns (https://www.sqlite.org/fileformat2.html,
    2.1 and 2.3).
    """
    low, high = payment_id & 0xFF, payment_id >> 8
    # An id has more than 56 bits: nine bytes, the last of which is whole.
    key = bytes(high >> shift & 0x7F | 0x80 for shift in range(49, -1, -7)) + bytes([low])
    return key + bytes([15, 0])


@asynccontextmanager
async def traced(folder: Path, strace: str, program: Sequence[str] = ()) -> AsyncIterator[tuple[ServerProcess, Caller]]:
    """Run a server under strace beside its bank; the trace is whole when the block has ended."""
    with bank_process(folder, "http://127.0.0.1:9/nobody") as bank:
        # A tracer takes its time.
        patience = {"PAYCORE_CHANNEL_TIMEOUT_MS": "15000", "PAYCORE_PAY_TIMEOUT_MS": "40000"}
        env = {"PAYCORE_SIMBANK_URL": bank.url, "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS), **patience}
        # Nobody but the calls writes.
        env |= {"PAYCORE_JOBS": "", "PAYCORE_FAILPOINTS": f"{GATE}=pause:{folder}"}
        server = ServerProcess(folder / "paycore.db", env=env)
        migrate(server.url)
        (folder / f"{GATE}.go").touch()
        server.program = [*tracer(strace, folder / "trace"), *(program or server.program)]
        with server:
            async with grpc.aio.insecure_channel(server.address) as channel:
                yield server, Caller(channel)
            assert server.terminate() == 0


async def make_one_group(server: ServerProcess, writes: int, held: Coroutine[Any, Any, None], *calls: Any) -> list[Any]:
    """Make calls while the writer is held with what another call writes, until so many writes wait to be one group.

    Return what the calls do.
    """
    reached, go = (server.db_path.with_name(f"{GATE}.{end}") for end in ("reached", "go"))
    reached.unlink(missing_ok=True)
    go.unlink()
    holding = asyncio.ensure_future(held)
    await asyncio.to_thread(wait_for, reached.exists, "the writer is held", 60)
    working = asyncio.gather(*calls)
    await asyncio.to_thread(wait_for, lambda: queued(server) == writes, f"{writes} writes wait", 60)
    go.touch()
    await holding
    return await working


def queued(server: ServerProcess) -> int:
    """How many writes wait."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=20) as page:
        lines = page.read().decode().splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("paycore_queue_depth")))


async def tell_one_by_one(folder: Path, strace: str, program: Sequence[str] = ()) -> list[Answered]:
    """Tell words, one after another."""
    async with traced(folder, strace, program) as (server, caller):
        for number in put_payments(server.url, ONE_BY_ONE):
            await caller.notify(number)
    return caller.answered


async def work_together(folder: Path, strace: str, program: Sequence[str] = ()) -> list[Answered]:
    """Pay, notify one by one and in a batch, all at once; then close what was opened, while others notify."""
    async with traced(folder, strace, program) as (server, caller):
        ahead, after, *numbers = put_payments(server.url, 2 + 2 * AT_ONCE + IN_BATCH)
        first, second, batch = numbers[:AT_ONCE], numbers[AT_ONCE : 2 * AT_ONCE], numbers[2 * AT_ONCE :]
        pays = [caller.pay(f"order-{number}-durable") for number in range(ORDERS)]
        calls = [*pays, caller.notify_batch(batch), *map(caller.notify, first)]
        payment_ids = (await make_one_group(server, ORDERS + IN_BATCH + AT_ONCE, caller.notify(ahead), *calls))[:ORDERS]
        # Who answers too early has not written it yet, neither here nor below.
        held = "SELECT 1 FROM channel_order WHERE lease_until_ms > 0"
        await asyncio.to_thread(wait_for, lambda: not select(server.db_path, held), "all pages are written")
        calls = [*map(caller.close, payment_ids), *map(caller.notify, second)]
        await make_one_group(server, ORDERS + AT_ONCE, caller.notify(after), *calls)
        closed = "SELECT 1 FROM payment_outcome WHERE close_reason > 0"
        await asyncio.to_thread(wait_for, lambda: len(select(server.db_path, closed)) == ORDERS, "all are closed")
        together = "SELECT count(*) FROM payment_outcome GROUP BY writer_no, group_no ORDER BY 1 DESC LIMIT 2"
        sizes = [count for (count,) in select(server.db_path, together)]
        assert sizes == [IN_BATCH + AT_ONCE, AT_ONCE], "each group held the words of all calls at once"
    return caller.answered


async def test_notify_is_answered_after_the_sync_of_its_word(tmp_path: Path, strace: str) -> None:
    answered = await tell_one_by_one(tmp_path, strace)
    assert len(answered) == ONE_BY_ONE
    assert not hasty_answers(answered, read_trace(tmp_path / "trace"))


async def test_calls_of_one_group_are_answered_after_its_sync(tmp_path: Path, strace: str) -> None:
    answered = await work_together(tmp_path, strace)
    assert len(answered) == 2 + 2 * AT_ONCE + 1 + 2 * ORDERS
    assert not hasty_answers(answered, read_trace(tmp_path / "trace"))


async def test_server_that_answers_words_before_it_commits_is_caught(tmp_path: Path, strace: str) -> None:
    answered = await tell_one_by_one(tmp_path, strace, HASTY)
    assert hasty_answers(answered, read_trace(tmp_path / "trace")) == [one.what for one in answered]


async def test_server_that_answers_any_call_before_it_commits_is_caught(tmp_path: Path, strace: str) -> None:
    answered = await work_together(tmp_path, strace, HASTY)
    hasty = hasty_answers(answered, read_trace(tmp_path / "trace"))
    assert {what.split()[0] for what in hasty} == {"Notify", "NotifyBatch", "Pay", "Close"}
