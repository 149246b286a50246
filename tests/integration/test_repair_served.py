"""A server's own jobs, by the clock on the wall: nobody asks for anything here but the user."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from paycore.client import PaycoreClient
from paycore.domain.ids import format_channel_order_no
from paycore.v1 import payment_pb2
from tests.support.bank import Street
from tests.support.core import AMOUNT_MINOR, CHANNEL
from tests.support.server import ServerProcess
from tests.support.simbank import SECRETS, wait_for

VALIDITY_MS = 1_500


class Served(NamedTuple):
    """A server whose jobs are quick, the banks, and a client."""

    server: ServerProcess
    street: Street
    client: PaycoreClient

    def pay(self, order_no: str, bank: str = "bank_a", validity_ms: int = 60_000) -> int:
        paid = self.client.pay(
            merchant_id="shop",
            merchant_order_no=order_no,
            amount_minor=AMOUNT_MINOR,
            currency="CNY",
            subject=order_no,
            channel=CHANNEL,
            account=bank,
            method=payment_pb2.PAY_METHOD_REDIRECT,
            validity_ms=validity_ms,
        )
        return paid.payment_id

    def wait_for(self, payment_id: int, state: payment_pb2.PaymentState.ValueType) -> Any:
        def look() -> payment_pb2.Payment | None:
            payment = self.client.query(payment_id=payment_id)
            return payment if payment.state == state else None

        return wait_for(look, f"payment {payment_id} is {payment_pb2.PaymentState.Name(state)}")


@pytest.fixture(scope="module")
def served(street: Street, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    env = {
        "PAYCORE_SIMBANK_URL": street.bank.url,
        "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
        "PAYCORE_SIMBANK_QUERY_LADDER_SECONDS": "1,1,1",
        "PAYCORE_REPAIR_INTERVAL_MS": "50",
        "PAYCORE_MIN_VALIDITY_SECONDS": "1",
        "PAYCORE_MIN_REMAINING_SECONDS": "0",
        "PAYCORE_LATE_GRACE_MS": "0",
    }
    with (
        ServerProcess(tmp_path_factory.mktemp("served") / "paycore.db", env=env) as server,
        PaycoreClient(server.address) as client,
    ):
        yield Served(server, street, client)


def test_payment_that_nobody_pays_is_closed_soon_after_its_expiry(served: Served) -> None:
    payment_id = served.pay("served-unpaid", validity_ms=VALIDITY_MS)
    payment = served.wait_for(payment_id, payment_pb2.PAYMENT_STATE_CLOSED)
    assert payment.outcome.close_reason == payment_pb2.CLOSE_REASON_EXPIRED
    late_ms = payment.outcome.recorded_at.ToMilliseconds() - payment.expire_at.ToMilliseconds()
    assert 0 < late_ms < 10_000
    assert served.street.driver.order(format_channel_order_no(payment_id, 1))["state"] == "CLOSED"


def test_payment_whose_notification_is_lost_is_found_soon(served: Served) -> None:
    payment_id = served.pay("served-lost")
    served.street.driver.plant(subject="served-lost", notify_never=True)
    served.street.driver.pay(format_channel_order_no(payment_id, 1))
    payment = served.wait_for(payment_id, payment_pb2.PAYMENT_STATE_PAID)
    assert payment.outcome.source == payment_pb2.CAPTURE_SOURCE_QUERY


def test_older_page_is_closed_soon_after_a_younger_one_was_opened(served: Served) -> None:
    payment_id = served.pay("served-superseded")
    assert served.pay("served-superseded", "bank_b") == payment_id
    driver = served.street.driver
    wait_for(lambda: driver.order(format_channel_order_no(payment_id, 1))["state"] == "CLOSED", "the older page closed")
    assert driver.order(format_channel_order_no(payment_id, 2), "bank_b")["state"] == "NOT_PAID"


def test_each_job_tells_when_it_last_made_a_pass(served: Served) -> None:
    with urllib.request.urlopen(f"http://{served.server.metrics_address}/metrics") as page:
        text = page.read().decode()
    for job in ("closer", "recoverer", "ender"):
        assert f'paycore_job_last_success_timestamp_seconds{{job="{job}"}}' in text
        assert f'paycore_job_failures_total{{job="{job}"}} 0.0' in text
