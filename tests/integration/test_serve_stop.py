"""SIGTERM while notifications are in flight: what was answered OK is in the database, and everybody is answered."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from paycore.client import NO_RETRY, PaycoreClient, PaycoreRpcError
from paycore.client.aio import AsyncPaycoreClient
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.support.facts import AMOUNT_MINOR, CURRENCY, now_ms, put_payments, select
from tests.support.server import ServerProcess, check_health
from tests.support.simbank import SECRETS, wait_for

CALLERS = 40
PAYMENTS = 4_000
ANSWER_SECONDS = 30

# With a channel configured, put_payments' attempts are on accounts that the index has codes for.
SIMBANK = {
    "PAYCORE_SIMBANK_URL": "http://127.0.0.1:9",
    "PAYCORE_SIMBANK_SECRETS": str(SECRETS).replace("'", '"'),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path / "paycore.db", env=SIMBANK) as process:
        yield process


def word_of(number: str) -> dict[str, Any]:
    """A success of a payment that put_payments wrote."""
    return {
        "channel": "simbank",
        "account": "bank_a",
        "channel_order_no": number,
        "result": payment_pb2.CHANNEL_RESULT_SUCCESS,
        "amount_minor": AMOUNT_MINOR,
        "currency": CURRENCY,
        "channel_trade_no": f"T-{number}",
        "paid_at_ms": now_ms(),
    }


def notify(address: str, number: str) -> payment_service_pb2.NotifyResponse:
    with PaycoreClient(address) as client:
        return client.notify(**word_of(number))


class Load:
    """Callers that notify one payment after the other until refused; none calls again."""

    def __init__(self, address: str, numbers: list[str]) -> None:
        self._address = address
        self._waiting = list(numbers)
        self.accepted: list[str] = []
        self.refused: Counter[str] = Counter()

    async def run(self) -> None:
        async with AsyncPaycoreClient(self._address, timeout_ms=ANSWER_SECONDS * 1_000, retry=NO_RETRY) as client:
            await asyncio.gather(*(self._caller(client) for _ in range(CALLERS)))

    async def _caller(self, client: AsyncPaycoreClient) -> None:
        while self._waiting:
            number = self._waiting.pop()
            try:
                response = await client.notify(**word_of(number))
            except PaycoreRpcError as error:
                self.refused[error.code.name] += 1
                return
            assert response.outcome == payment_pb2.NOTIFY_OUTCOME_ACCEPTED
            self.accepted.append(number)


async def until_accepted(load: Load, count: int) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while len(load.accepted) < count:
            await asyncio.sleep(0.005)


def paid_numbers(server: ServerProcess) -> set[str]:
    return {
        trade.removeprefix("T-") for (trade,) in select(server.db_path, "SELECT channel_trade_no FROM payment_outcome")
    }


async def test_sigterm_under_load_loses_no_acknowledged_notification_and_answers_everybody(
    server: ServerProcess,
) -> None:
    numbers = put_payments(server.url, PAYMENTS)
    load = Load(server.address, numbers)
    async with asyncio.timeout(2 * ANSWER_SECONDS):
        running = asyncio.create_task(load.run())
        await until_accepted(load, 200)
        server.process.send_signal(signal.SIGTERM)
        await running
    assert await asyncio.to_thread(server.wait) == 0
    assert len(load.accepted) < PAYMENTS, "the server was not stopped under load"
    assert sum(load.refused.values()) == CALLERS
    assert set(load.refused) <= {"UNAVAILABLE", "CANCELLED"}
    # Calls that were taken in were answered, so nothing is committed that its caller was not told of.
    assert set(load.accepted) == paid_numbers(server)


def test_sigterm_between_commit_and_answer_still_answers_the_caller(tmp_path: Path) -> None:
    place = "writer.before_answer"
    reached, go = tmp_path / f"{place}.reached", tmp_path / f"{place}.go"
    go.touch()
    # What a job writes would be held there too, and the word behind it.
    env = {**SIMBANK, "PAYCORE_JOBS": "", "PAYCORE_FAILPOINTS": f"{place}=pause:{tmp_path}"}
    with ServerProcess(tmp_path / "paycore.db", env=env) as server, ThreadPoolExecutor(1) as caller:
        (number,) = put_payments(server.url, 1)
        reached.unlink()
        go.unlink()
        answer = caller.submit(notify, server.address, number)
        began = time.monotonic()

        def committed() -> bool:
            paid = paid_numbers(server) == {number}
            if not paid and time.monotonic() > began + 2:
                # A sign of life stands there, and the word behind it.
                go.touch()
                time.sleep(0.02)
                go.unlink()
            return paid

        try:
            wait_for(committed, "the outcome is committed")
            wait_for(reached.exists, "the writer stands before the answer")
            assert not answer.done()
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: '"stopping"' in server.log(), "the server is stopping")
        finally:
            go.touch()
        assert answer.result(ANSWER_SECONDS).outcome == payment_pb2.NOTIFY_OUTCOME_ACCEPTED
        assert server.wait() == 0


async def test_kill_under_load_loses_no_acknowledged_notification(server: ServerProcess) -> None:
    numbers = put_payments(server.url, PAYMENTS)
    load = Load(server.address, numbers)
    async with asyncio.timeout(2 * ANSWER_SECONDS):
        running = asyncio.create_task(load.run())
        await until_accepted(load, 200)
        server.kill()
        await running
    server.restart()
    assert set(load.accepted) <= paid_numbers(server)


def test_sigterm_with_a_health_watch_open_ends_within_the_grace(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.address) as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        states = watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(states).status == health_pb2.HealthCheckResponse.SERVING
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert next(states).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.wait() == 0
        # The default grace is 10 s; a stream that never ends must not use it up.
        assert time.monotonic() - began < 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_an_idle_server_with_exit_code_zero_and_no_complaint(
    server: ServerProcess, number: signal.Signals
) -> None:
    server.process.send_signal(number)
    assert server.wait() == 0
    assert '"stopped"' in server.log()
    assert "Traceback" not in server.log()
    assert check_health(server.address) == "UNAVAILABLE"


def test_restarted_server_serves_the_same_address_and_remembers(server: ServerProcess) -> None:
    (number,) = put_payments(server.url, 1)

    def word() -> tuple[int, bool]:
        response = notify(server.address, number)
        return response.outcome, response.replayed

    address = server.address
    assert word() == (payment_pb2.NOTIFY_OUTCOME_ACCEPTED, False)
    assert server.terminate() == 0
    server.restart()
    assert server.address == address
    assert word() == (payment_pb2.NOTIFY_OUTCOME_ACCEPTED, True)
