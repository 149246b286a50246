"""Query that asks the channels first: what they say is taken in, and what they do not say fails nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from paycore.cli import build
from paycore.client import PaycoreClient
from paycore.client.aio import AsyncPaycoreClient
from paycore.domain.errors import NotFoundError
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import AttemptState, CaptureSource, PaymentState
from paycore.usecases.keys import ByPaymentId
from paycore.usecases.query import Refreshed
from paycore.v1 import payment_pb2
from tests.support.bank import Street, Town, a_town
from tests.support.core import AMOUNT_MINOR, CHANNEL, check_money_rules
from tests.support.repair import Watched
from tests.support.server import ServerProcess
from tests.support.simbank import SECRETS

ONCE: dict[str, Any] = {"value": True, "times": 1}


async def opened(town: Town, *banks: str, **faults: Any) -> int:
    """A payment with an open page at each bank; faults are planted at bank A afterwards."""
    command = town.order()
    for bank in banks or ("bank_a",):
        result = await town.core.pay(command._replace(account=bank))
    town.plant(command, bank="bank_a", **faults)
    payment_id: int = result.payment.payment_id
    return payment_id


async def refresh(town: Town, payment_id: int, within_ms: int = 8_000) -> Refreshed:
    deadline_ms = town.clock.now_ms() + within_ms
    return await town.core.query.refresh(ByPaymentId(payment_id), deadline_ms=deadline_ms)


async def test_refresh_takes_in_money_that_was_never_notified(town: Town) -> None:
    payment_id = await opened(town, notify_never=True)
    (trade_no,) = town.user_pays(payment_id)
    assert (await town.file(payment_id)).record.state == PaymentState.OPEN
    file, unanswered = await refresh(town, payment_id)
    assert unanswered == []
    assert file.record.outcome is not None
    assert (file.record.state, file.record.outcome.channel_trade_no) == (PaymentState.PAID, trade_no)
    assert file.record.outcome.source == CaptureSource.QUERY


async def test_refresh_of_an_unpaid_payment_changes_nothing(town: Town) -> None:
    payment_id = await opened(town)
    with town.core.watch() as written:
        file, unanswered = await refresh(town, payment_id)
    assert written.tables == {}
    assert (file.record.state, unanswered) == (PaymentState.OPEN, [])
    assert town.books(payment_id)["state"] == "NOT_PAID"


async def test_refresh_asks_every_live_attempt_at_once_and_names_those_without_an_answer(town: Town) -> None:
    payment_id = await opened(town, "bank_a", "bank_b", hang_before_doing={"query": True})
    town.driver.plant(order_no=f"{payment_id}02", bank="bank_b", notify_never=True)
    town.user_pays(payment_id, 2, "bank_b")
    file, unanswered = await refresh(town, payment_id)
    assert unanswered == [1]
    assert file.record.state == PaymentState.PAID
    check_money_rules(town.core.snapshot())


@pytest.mark.parametrize(
    "fault",
    [{"error_500": {"query": True}}, {"nonsense": {"query": "html"}}, {"hang_after_doing": {"query": True}}],
    ids=["error", "nonsense", "hangs"],
)
async def test_refresh_without_an_answer_returns_what_is_on_record(town: Town, fault: dict[str, Any]) -> None:
    payment_id = await opened(town, notify_never=True, **fault)
    town.user_pays(payment_id)
    with town.core.watch() as written:
        file, unanswered = await refresh(town, payment_id)
    assert (file.record.state, unanswered) == (PaymentState.OPEN, [1])
    assert file.record.attempts[1].state == AttemptState.OPEN
    assert written.tables == {}


async def test_refresh_keeps_its_deadline_and_takes_the_late_answer_in_all_the_same(
    street: Street, db_url: str
) -> None:
    async with a_town(db_url, street, timeout_ms=15_000) as town:
        payment_id = await opened(town, notify_never=True, answer_delay_ms={"query": {"value": 1_200, "times": 1}})
        town.user_pays(payment_id)
        started = time.monotonic()
        file, unanswered = await refresh(town, payment_id, within_ms=400)
        assert time.monotonic() - started < 1
        assert (file.record.state, unanswered) == (PaymentState.OPEN, [1])
        await town.core.query.drain()
        assert (await town.file(payment_id)).record.state == PaymentState.PAID


async def test_refresh_of_a_settled_payment_asks_nobody(town: Town) -> None:
    payment_id = await opened(town)
    await town.core.notify(town.core.word(payment_id))
    watched = Watched(town, payment_id)
    file, unanswered = await refresh(town, payment_id)
    assert (file.record.state, unanswered, watched.queries) == (PaymentState.PAID, [], 0)


async def test_refresh_of_an_unknown_payment_is_not_found(town: Town) -> None:
    with pytest.raises(NotFoundError):
        await refresh(town, 1)


async def test_refreshes_and_a_notification_at_once_write_one_outcome(town: Town) -> None:
    payment_id = await opened(town)
    (trade_no,) = town.user_pays(payment_id)
    word = town.core.notify(town.core.word(payment_id, 1, trade_no))
    await asyncio.gather(word, *(refresh(town, payment_id) for _ in range(5)))
    rows = town.core.snapshot()
    assert [row.payment_id for row in rows["payment_outcome"]] == [payment_id]
    assert not rows["excess_payment"]
    assert not rows["quarantine"]


@pytest.fixture(scope="module")
def server(street: Street, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose jobs rest, so that nobody but Query asks."""
    env = {
        "PAYCORE_SIMBANK_URL": street.bank.url,
        "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
        "PAYCORE_REPAIR_INTERVAL_MS": "600000",
    }
    with ServerProcess(tmp_path_factory.mktemp("refresh") / "paycore.db", env=env) as process:
        yield process


def paid_in_silence(server: ServerProcess, street: Street, order_no: str, **faults: Any) -> int:
    """A payment that was paid, of which its bank tells nobody; return its id."""
    with PaycoreClient(server.address) as client:
        payment_id = client.pay(
            merchant_id="shop",
            merchant_order_no=order_no,
            amount_minor=AMOUNT_MINOR,
            currency="CNY",
            subject=order_no,
            channel=CHANNEL,
            account="bank_a",
            method=payment_pb2.PAY_METHOD_REDIRECT,
        ).payment_id
        street.driver.plant(subject=order_no, notify_never=True, **faults)
        street.driver.pay(format_channel_order_no(payment_id, 1))
        assert client.query(payment_id=payment_id).state == payment_pb2.PAYMENT_STATE_OPEN
    return payment_id


def test_client_that_refreshes_is_told_of_the_money(server: ServerProcess, street: Street) -> None:
    payment_id = paid_in_silence(server, street, "refreshed-by-client")
    with PaycoreClient(server.address) as client:
        answer = client.refresh(payment_id=payment_id)
    assert (answer.payment.state, list(answer.unanswered_attempts)) == (payment_pb2.PAYMENT_STATE_PAID, [])


async def test_asyncio_client_that_refreshes_is_told_whom_nobody_answered_for(
    server: ServerProcess, street: Street
) -> None:
    payment_id = paid_in_silence(server, street, "refreshed-by-aio", error_500={"query": ONCE})
    async with AsyncPaycoreClient(server.address) as client:
        answer = await client.refresh(merchant_id="shop", merchant_order_no="refreshed-by-aio")
        assert (answer.payment.state, list(answer.unanswered_attempts)) == (payment_pb2.PAYMENT_STATE_OPEN, [1])
        answer = await client.refresh(channel_order_no=format_channel_order_no(payment_id, 1))
    assert answer.payment.state == payment_pb2.PAYMENT_STATE_PAID


def test_client_that_refreshes_gets_its_answer_before_its_deadline(server: ServerProcess, street: Street) -> None:
    payment_id = paid_in_silence(server, street, "refreshed-in-a-hurry", hang_before_doing={"query": ONCE})
    with PaycoreClient(server.address) as client:
        answer = client.refresh(payment_id=payment_id, timeout_ms=700)
    assert (answer.payment.state, list(answer.unanswered_attempts)) == (payment_pb2.PAYMENT_STATE_OPEN, [1])


def test_command_that_refreshes_prints_the_payment_and_whom_nobody_answered_for(
    server: ServerProcess, street: Street
) -> None:
    payment_id = paid_in_silence(server, street, "refreshed-by-hand", error_500={"query": ONCE})
    arguments = ["query", "--payment-id", str(payment_id), "--refresh", "--server", server.address]
    silent = CliRunner().invoke(build(["query", "pay"]), [*arguments, "--json"])
    assert silent.exit_code == 0, silent.output
    assert "attempt 1: its channel gave no answer" in silent.stderr
    assert json.loads(silent.stdout)["state"] == "PAYMENT_STATE_OPEN"
    told = CliRunner().invoke(build(["query", "pay"]), arguments)
    assert (told.exit_code, told.stderr) == (0, "")
    assert "PAID by attempt 1" in told.stdout
